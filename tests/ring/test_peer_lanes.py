"""What one rank enqueues and holds for the peer transport, through the comm that it is part of."""

import random
import weakref

import torch

from extend.ring.comm import RingComm
from extend.ring.links import Group
from extend.ring.peer import PeerBuffers
from tests.ring.peer_programs import MINUTE
from tests.ring.simulated_gpus import Gpu, Machine, Notes


def comm_of(gpu, watchdog=None, seconds=None):
    """A comm over all GPUs of a machine, seen from one."""
    comm = RingComm.alone()
    comm._wanted = "peer"
    ranks = tuple(range(len(gpu.machine.streams)))
    comm._join(Group(ranks, gpu.rank, MINUTE, "simulated"), ranks, seconds)
    comm.link.peers = PeerBuffers(gpu, gpu.rank, ranks, watchdog or Notes())
    comm.link.reason = "simulated"
    return comm


def everything(buffer, receiver):
    return buffer


def kinds(queue):
    return [kind for kind, *_ in queue]


def test_the_order_on_each_stream():
    gpu, notes = Gpu(Machine(3), 0), Notes()
    comm = comm_of(gpu, notes, seconds=5)
    current, side = gpu.machine.streams[0].values()
    window = comm.publish("lane", (4,), torch.zeros(4), lambda buffer: buffer.fill_(1))
    published = ["wait", "wait", "write", "write", "mark", "run", "write", "write"]
    assert kinds(current) == published and not side
    transfer = window.fetch(1, torch.zeros(4), everything)
    again = window.fetch(1, torch.zeros(4), everything)
    assert kinds(current) == [*published, "mark", "mark"]  # computing goes on
    assert kinds(side) == ["wait for mark", "wait", "run", "mark", "wait for mark", "run", "mark"]
    transfer.wait()
    assert current[-1][:2] == ("wait for mark", side[3].what)
    window.fetch(1, None, lambda buffer, receiver: None).wait()
    assert len(side) == 7 and len(current) == len(published) + 3
    window.close()
    window.close()
    closed = ["wait for mark", "write", "write", "wait", "write", "write", "mark"]
    assert kinds(side)[7:] == closed
    again.wait()
    assert current[-1][:2] == ("wait for mark", side[6].what)  # not for what closing waits for
    assert [(a.what, a.seconds) for a in notes.told] == [
        ("read what was published before in lane 'lane'", 5),
        *[("publish in lane 'lane'", 5)] * 3,
    ]


def test_fetching_from_itself_needs_no_flag():
    gpu, notes = Gpu(Machine(2), 0), Notes()
    comm, into = comm_of(gpu, notes), torch.zeros(4)
    current, side = gpu.machine.streams[0].values()
    for waits in (True, False):
        before = kinds(current).count("wait for mark")
        window = comm.publish("lane", (4,), torch.zeros(4), lambda buffer: None)
        transfer = window.fetch(0, into, everything)
        assert kinds(side)[-3:] == ["wait for mark", "run", "mark"]
        if waits:
            transfer.wait()
        comm.publish("lane", (4,), torch.zeros(4), lambda buffer: None)
        # Before anything is overwritten the current stream has waited for the copy, once.
        assert kinds(current).count("wait for mark") == before + 1
    # Only publishing is told, and closing, which waits for the other rank.
    assert [a.what[:4] for a in notes.told] == ["read", "publ"] * 3 + ["read"]


def test_a_tensor_of_any_strides_can_be_published():
    machine = Machine(2)
    tensors = [torch.arange(6).view(2, 3).t() + 10 * rank for rank in range(2)]
    rooms = [torch.zeros(3, 2, dtype=torch.int64) for _ in range(2)]
    for rank in range(2):
        window = comm_of(Gpu(machine, rank)).publish_tensor("lane", tensors[rank])
        window.fetch(1, rooms[rank], everything)
    machine.run(random.Random(0))
    torch.testing.assert_close(rooms, tensors[::-1])


def test_memory_is_taken_only_to_grow():
    gpu = Gpu(Machine(1), 0)
    buffers = PeerBuffers(gpu, 0, (0,), Notes())
    forms = ((8,), torch.float32), ((4, 2), torch.int32), ((16,), torch.bfloat16), ((9,), torch.int)
    for shape, dtype in forms:
        like = torch.zeros((), dtype=dtype)
        offer = buffers.publish("lane", torch.Size(shape), like, lambda buffer: None, MINUTE)
        assert (offer.view(0).shape, offer.view(0).dtype) == (torch.Size(shape), like.dtype)
    assert [size_bytes for size_bytes, _ in gpu.machine.buffers] == [32, 36]


def test_what_is_written_lives_until_the_transfer_was_waited_for():
    gpu = Gpu(Machine(2), 0)
    comm, into = comm_of(gpu), torch.zeros(4)
    alive = weakref.ref(into)
    window = comm.publish("lane", (4,), torch.zeros(4), lambda buffer: None)
    transfer = window.fetch(1, into, everything)
    gpu.machine.streams[0]["side"].clear()  # as if done, but not waited for
    del into
    assert alive() is not None
    transfer.wait()
    assert alive() is None


def test_no_watchdog_keeps_a_buffer():
    # To free one torch waits for the GPU: nothing for the thread that watches it.
    gpu, notes = Gpu(Machine(2), 0), Notes()
    comm = comm_of(gpu, notes)
    window = comm.publish("lane", (4,), torch.zeros(4), lambda buffer: None)
    buffer = weakref.ref(comm.link.peers._lanes["lane"].form.buffer)
    assert notes.told[0].missing() == []
    gpu.machine.streams[0]["current"].clear()
    del window
    comm.link.peers = None
    assert buffer() is None
    assert notes.told[0].missing() is None


def test_an_empty_tensor_needs_no_memory():
    gpu = Gpu(Machine(2), 0)
    window = comm_of(gpu).publish("lane", (0, 3), torch.zeros(1), lambda buffer: None)
    window.fetch(1, torch.zeros(0, 3), everything).wait()
    assert gpu.machine.buffers == []
