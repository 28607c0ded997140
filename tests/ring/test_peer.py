"""The peer transport on simulated GPUs: streams are queues, and any order they allow may happen."""

import random
import threading
import weakref
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import pytest
import torch

from extend.ring import peer
from extend.ring.comm import RingComm
from extend.ring.links import Group
from extend.ring.peer import Facts, PeerBuffers, open_peers, probe, refusal
from tests.spawn import spawn

MINUTE = timedelta(seconds=60)


class Machine:
    """Some GPUs, each with a current and a side stream; nothing runs before `run`."""

    def __init__(self, world):
        self.streams = [{"current": [], "side": []} for _ in range(world)]
        self.memory = []  # one entry for each buffer: the bytes of every rank

    def run(self, order):
        """Execute everything that was enqueued, choosing among what is ready by `order`."""
        while any(queue for streams in self.streams for queue in streams.values()):
            ready = [
                (rank, name) for rank, streams in enumerate(self.streams)
                for name, queue in streams.items() if queue and self.is_ready(queue[0])
            ]  # fmt: skip
            assert ready, f"deadlock: {self.heads()}"
            self.step(*order.choice(ready))

    def is_ready(self, operation):
        kind, what = operation
        if kind == "wait":
            return what["happened"]
        if kind == "barrier":
            return all(operation in heads for heads in self.heads())
        return True

    def step(self, rank, name):
        kind, what = self.streams[rank][name].pop(0)
        if kind == "run":
            what()
        elif kind == "record":
            what["happened"] = True
        elif kind == "barrier":
            for other, streams in enumerate(self.streams):
                if other != rank:
                    next(q for q in streams.values() if q and q[0] == (kind, what)).pop(0)

    def heads(self):
        return [[queue[0] for queue in s.values() if queue] for s in self.streams]


class Gpu:
    """One rank's GPU, as the transport sees it."""

    def __init__(self, machine, rank):
        self.machine, self.rank, self.name, self.allocated = machine, rank, "current", 0

    def enqueue(self, kind, what):
        self.machine.streams[self.rank][self.name].append((kind, what))

    def allocate(self, size_bytes):
        memory = self.machine.memory
        if self.allocated == len(memory):
            world = len(self.machine.streams)
            memory.append(torch.full((world, size_bytes), 255, dtype=torch.uint8))
        assert memory[self.allocated].shape[1] == size_bytes
        self.allocated += 1
        return Buffer(self, self.allocated - 1)

    @contextmanager
    def side(self):
        wait_for_current = self.mark()
        self.name = "side"
        wait_for_current()
        yield
        self.name = "current"

    def issue(self, work):
        self.enqueue("run", work)

    def mark(self):
        event = {"happened": False}
        self.enqueue("record", event)
        return lambda: self.enqueue("wait", event)


class Buffer:
    """Memory that all ranks of a machine see."""

    def __init__(self, gpu, index):
        self.gpu, self.index = gpu, index

    def view(self, owner, shape, dtype):
        size = shape.numel() * dtype.itemsize
        return self.gpu.machine.memory[self.index][owner][:size].view(dtype).view(shape)

    def barrier(self, channel, timeout):
        assert timeout == MINUTE
        self.gpu.enqueue("barrier", (self.index, channel))


def comm_of(gpu):
    """A comm over all GPUs of a machine, seen from one."""
    comm = RingComm.alone()
    comm._wanted = "peer"
    ranks = tuple(range(len(gpu.machine.streams)))
    comm._join(Group(ranks, gpu.rank, MINUTE, "simulated"), ranks, None)
    comm.link.peers, comm.link.reason = PeerBuffers(gpu, gpu.rank), "simulated"
    return comm


def number(rank, lane, turn):
    """What is published: on no two ranks, in no two lanes and turns, the same."""
    return 100 * turn + 10 * lane + rank


def from_receiver_on(buffer, receiver):
    return buffer[receiver:] if receiver != 1 else None


LANES = (0, 1, 0, 0)  # now and then the same one twice running
ROWS = (4, 4, 7, 4)  # buffers grow once, and hold less afterwards
TURNS = 8


def program(gpu):
    """What one rank's host enqueues: two publications under way at a time, then computation.

    Tensors are reused as early as is allowed: what was published is overwritten once a transfer of
    it has been waited for, and what was fetched once the current stream has used it.
    """
    comm, got, pending = comm_of(gpu), [], []
    mine = torch.zeros(2, max(ROWS), 3)
    into = torch.zeros(2, comm.world, max(ROWS), 3)
    for turn in range(TURNS):
        rows, lane = ROWS[turn % 4], LANES[turn % 4]
        source = mine[turn % 2, :rows]
        gpu.issue(partial(source.fill_, number(comm.rank, lane, turn)))
        window = comm.publish(str(lane), (rows, 3), source, lambda b, s=source: b.copy_(s))
        rooms = [
            None if comm.rank == 1 else into[turn % 2, step, : rows - comm.rank]
            for step in range(comm.world)
        ]
        requests = [(step, room, from_receiver_on) for step, room in enumerate(rooms)]
        pending.append((comm.fetch_all(window, requests), rooms))
        if turn % 2:
            for transfer, rooms in pending:
                transfer.wait()
                gpu.issue(partial(keep, got, rooms))
            pending = []
    return got


def keep(got, rooms):
    got.append([None if room is None else room.clone() for room in rooms])


def simulate(seed, gpu_class=Gpu, world=3):
    """What each rank's computation saw, in one of the orders that the streams allow."""
    machine = Machine(world)
    got = [program(gpu_class(machine, rank)) for rank in range(world)]
    machine.run(random.Random(seed))
    return got


def wanted(rank, step, turn, world=3):
    """What arrives from the rank `step` places back; None for nothing."""
    if rank == 1:
        return None
    value = number((rank - step) % world, LANES[turn % 4], turn)
    return torch.full((ROWS[turn % 4] - rank, 3), float(value))


def compare(got):
    want = [[[wanted(r, s, t) for s in range(3)] for t in range(TURNS)] for r in range(3)]
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_what_was_published_arrives_in_any_order_of_events():
    for seed in range(60):
        compare(simulate(seed))


class OneBarrier(Buffer):
    """Leaves out each publication's first or second barrier, on every rank."""

    skipped = 0
    count = 0

    def barrier(self, channel, timeout):
        self.count += 1
        if self.count % 2 != self.skipped:
            super().barrier(channel, timeout)


class NoFirstBarrier(Gpu):
    def allocate(self, size_bytes):
        buffer = OneBarrier(self, super().allocate(size_bytes).index)
        buffer.skipped = 1
        return buffer


class NoSecondBarrier(Gpu):
    def allocate(self, size_bytes):
        return OneBarrier(self, super().allocate(size_bytes).index)


class EagerSide(Gpu):
    """The side stream does not wait for the current one."""

    @contextmanager
    def side(self):
        self.name = "side"
        yield
        self.name = "current"


class NoWait(Gpu):
    """The current stream does not wait for the side stream."""

    def mark(self):
        waits = super().mark()
        return (lambda: None) if self.name == "side" else waits


@pytest.mark.parametrize("fault", [NoFirstBarrier, NoSecondBarrier, EagerSide, NoWait])
def test_each_guard_is_needed(fault):
    with pytest.raises(AssertionError, match="not equal|not close"):
        for seed in range(60):
            compare(simulate(seed, fault))


def kinds(queue):
    return [kind for kind, _ in queue]


def test_the_order_on_each_stream():
    machine = Machine(2)
    gpu = Gpu(machine, 0)
    comm = comm_of(gpu)
    current, side = machine.streams[0]["current"], machine.streams[0]["side"]
    window = comm.publish("lane", (4,), torch.zeros(4), lambda buffer: buffer.fill_(1))
    assert kinds(current) == ["record"]
    assert kinds(side) == ["wait", "barrier", "run", "barrier", "record"]
    assert side[1] == side[3] == ("barrier", (0, 0))
    transfer = window.fetch(1, torch.zeros(4), lambda buffer, receiver: buffer)
    assert kinds(current) == ["record", "record"]  # computing goes on
    assert kinds(side)[5:] == ["wait", "run", "record"]
    transfer.wait()
    assert current[2] == ("wait", side[7][1])
    nothing = window.fetch(1, None, lambda buffer, receiver: None)
    assert len(side) == 8
    nothing.wait()  # what is published must have been written
    assert current[3] == ("wait", side[4][1])
    comm.publish("other", (4,), torch.zeros(4), lambda buffer: None)
    assert side[9] == ("barrier", (1, 1))  # a buffer and a channel of its own


def test_a_tensor_of_any_strides_can_be_published():
    machine = Machine(2)
    tensors = [torch.arange(6).view(2, 3).t() + 10 * rank for rank in range(2)]
    rooms = [torch.zeros(3, 2, dtype=torch.int64) for _ in range(2)]
    for rank in range(2):
        window = comm_of(Gpu(machine, rank)).publish_tensor("lane", tensors[rank])
        window.fetch(1, rooms[rank], lambda buffer, receiver: buffer)
    machine.run(random.Random(0))
    torch.testing.assert_close(rooms, tensors[::-1])


def test_memory_is_taken_only_to_grow():
    machine = Machine(1)
    gpu = Gpu(machine, 0)
    buffers = PeerBuffers(gpu, 0)
    forms = ((8,), torch.float32), ((4, 2), torch.int32), ((16,), torch.bfloat16), ((9,), torch.int)
    for shape, dtype in forms:
        like = torch.zeros((), dtype=dtype)
        offer = buffers.publish("lane", torch.Size(shape), like, lambda buffer: None, MINUTE)
        assert (offer.view(0).shape, offer.view(0).dtype) == (torch.Size(shape), like.dtype)
    assert [memory.shape[1] for memory in machine.memory] == [32, 36]


def test_what_is_read_lives_until_the_transfer_was_waited_for():
    comm = comm_of(Gpu(Machine(2), 0))
    source, into = torch.zeros(4), torch.zeros(4)
    alive = weakref.ref(source), weakref.ref(into)
    window = comm.publish("lane", (4,), source, partial(torch.Tensor.copy_, source))
    transfer = window.fetch(1, into, lambda buffer, receiver: buffer)
    comm.link.peers._device.machine.streams[0]["side"].clear()  # as if done, but not waited for
    del source, into, window
    assert all(ref() is not None for ref in alive)
    transfer.wait()
    assert all(ref() is None for ref in alive)


def test_an_empty_tensor_needs_no_memory():
    gpu = Gpu(Machine(2), 0)
    window = comm_of(gpu).publish("lane", (0, 3), torch.zeros(1), lambda buffer: None)
    window.fetch(1, torch.zeros(0, 3), lambda buffer, receiver: buffer).wait()
    assert gpu.machine.memory == []


def test_which_ranks_can_share_memory():
    first = Facts("a 1", "gpu-0", ["gpu-0", "gpu-1"], ["gpu-0", "gpu-1"])
    second = Facts("a 1", "gpu-1", ["gpu-0", "gpu-1"], ["gpu-0", "gpu-1"])
    assert refusal({4: first, 5: second}) is None
    alone = first._replace(visible=["gpu-0"], reachable=["gpu-0"])  # nothing is known of gpu-1
    assert refusal({4: alone, 5: second}) is None
    away = second._replace(host="b 2")
    assert refusal({4: first, 5: away}) == "the ranks run on 2 hosts (a, b)"
    renamed = second._replace(host="a 2")  # two hosts of one name
    assert "2 hosts" in refusal({4: first, 5: renamed})
    cut_off = second._replace(reachable=["gpu-1"])
    assert "GPU of rank 5 does not reach the memory of that of rank 4" in refusal(
        {4: first, 5: cut_off}
    )


class ThreadBuffer:
    """Memory of one rank that is a thread."""

    def __init__(self, memory, meeting):
        self.memory, self.meeting = memory, meeting

    def view(self, owner, shape, dtype):
        return self.memory[owner][: shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def barrier(self, channel, timeout):
        self.meeting.wait(timeout.total_seconds())


@pytest.mark.parametrize("shared", [True, False])
def test_a_probe_notices_memory_that_is_not_shared(shared):
    world, found = 3, {}
    memories = [torch.zeros(world, 64, dtype=torch.uint8) for _ in range(world)]
    meeting = threading.Barrier(world)

    def work(rank):
        buffer = ThreadBuffer(memories[0 if shared else rank], meeting)
        found[rank] = probe(buffer, rank, world, MINUTE)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if shared:
        assert found == {0: "", 1: "", 2: ""}
    else:
        assert found[1] == "reads [0, 2, 0] where the ranks wrote [1, 2, 3]"


class OneThatFails:
    """A device without symmetric memory on rank 1."""

    def __init__(self, group_name, seats):
        assert (group_name, seats) == ("name", [1, 0])

    def allocate(self, size_bytes):
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("not on this GPU\nand a stack of C++ frames")
        return "never looked at"


def open_where_one_fails(rank, world):
    peer.CudaDevice = OneThatFails
    return open_peers(lambda: "name", (1, 0), (0, 1), 1 - rank, MINUTE)


def test_a_failure_of_one_rank_decides_for_all():
    reason = "rank 1: no symmetric memory (not on this GPU)"
    assert spawn(2, open_where_one_fails) == [(None, reason), (None, reason)]
