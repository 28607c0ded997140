"""The peer transport on simulated GPUs, in any order of events that streams and flags allow.

Why nothing blocks for ever, which the random programs below try out: take what all ranks enqueue in
the order of the program that they share. Whatever waits, waits for something earlier in that order:
publishing for the closing of the lane's last window, fetching and closing for the publication, a
stream for what another of its GPU held. Of all that is not done yet, the earliest thing therefore
waits for nothing; and it stands at the head of its stream, since streams, too, hold things in that
order. The same holds if both streams of a GPU share one queue. Hosts add only that, when a
buffer grows, they wait for what they enqueued before and meet at one line of the program.
"""

import random
from contextlib import contextmanager

import pytest
import torch

from extend.ring.peer import PeerOffer
from extend.ring.peer_cuda import CudaBuffer, first_flags, flags_begin
from tests.ring.peer_programs import Player, Step, make_program, simulate
from tests.ring.simulated_gpus import Gpu, Machine, Notes, OneQueue

SEEDS = range(60)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_what_was_published_arrives_in_any_order_of_events(world):
    for seed in SEEDS:
        simulate(seed, world=world)


def test_one_queue_for_all_streams_is_enough():
    for seed in SEEDS:
        simulate(seed, OneQueue)


class Capturing(Gpu):
    def is_capturing(self):
        return True


def test_a_graph_computes_the_same():
    for seed in SEEDS:
        simulate(seed, Capturing)


class ReadsNotAwaited(CudaBuffer):
    def wait_until_read(self):
        self._words.write([self._read[r] for r in self._others], 0)


class ReadsNotTakenBack(CudaBuffer):
    def wait_until_read(self):
        self._words.wait([self._read[r] for r in self._others])


class ReadsTakenBackFirst(CudaBuffer):
    def wait_until_read(self):
        ReadsNotAwaited.wait_until_read(self)
        ReadsNotTakenBack.wait_until_read(self)


class WrittenNotSaid(CudaBuffer):
    def say_written(self):
        pass


class WrittenSaidFirst(CudaBuffer):
    def wait_until_read(self):
        super().wait_until_read()
        super().say_written()

    def say_written(self):
        pass


class WrittenNotAwaited(CudaBuffer):
    def wait_until_written(self, owner):
        pass


class WrittenNotTakenBack(CudaBuffer):
    def say_read(self, owner):
        self._words.write([self._their_read[owner]], 1)


class ReadNotSaid(CudaBuffer):
    def say_read(self, owner):
        self._words.write([self._written[owner]], 0)


class ReadSaidFirst(CudaBuffer):
    """Before the copy, as soon as it could begin."""

    def wait_until_written(self, owner):
        super().wait_until_written(owner)
        super().say_read(owner)

    def say_read(self, owner):
        pass


class ReadSaidBeforeTakingBack(CudaBuffer):
    def say_read(self, owner):
        WrittenNotTakenBack.say_read(self, owner)
        ReadNotSaid.say_read(self, owner)


FAULTY_FLAGS = [
    ReadsNotAwaited, ReadsNotTakenBack, ReadsTakenBackFirst, WrittenNotSaid, WrittenSaidFirst,
    WrittenNotAwaited, WrittenNotTakenBack, ReadNotSaid, ReadSaidFirst, ReadSaidBeforeTakingBack,
]  # fmt: skip


def is_noticed(gpu_class):
    with pytest.raises(AssertionError, match="not equal|not close|deadlock"):
        for seed in SEEDS:
            simulate(seed, gpu_class)


@pytest.mark.parametrize("fault", FAULTY_FLAGS)
def test_each_flag_is_needed_and_in_its_place(fault):
    is_noticed(type("Faulty", (Gpu,), {"buffer_class": fault}))


class EagerSide(Gpu):
    """The side stream does not wait for the current one."""

    @contextmanager
    def side(self):
        self.name = "side"
        yield
        self.name = "current"


def without_waiting(offer, done):
    """A transfer's end that the current stream does not wait for."""


def without_the_late(offer, owner):
    """Closing without a wait for those that nothing was fetched from."""
    if not offer._closed:
        honest_await(offer, owner)


def without_itself(offer):
    """Publishing while this rank itself still reads what it published before."""


honest_await = PeerOffer._await
FAULTS = {"_finish": without_waiting, "_await": without_the_late, "let_go": without_itself}


def test_the_side_stream_must_wait_for_the_current_one():
    is_noticed(EagerSide)


@pytest.mark.parametrize("method", FAULTS)
def test_each_wait_of_an_offer_is_needed(method, monkeypatch):
    monkeypatch.setattr(PeerOffer, method, FAULTS[method])
    is_noticed(Gpu)


def test_flags_are_in_the_end_what_they_were():
    machine, program = Machine(3), make_program(0, 3)
    program += [Step("close", lane) for lane in "ab"]
    for rank in range(3):
        Player(Gpu(machine, rank), Notes()).play(program)
    machine.run(random.Random(0))
    assert machine.buffers
    for size_bytes, memories in machine.buffers:
        for memory in memories:
            flags = memory[flags_begin(size_bytes) :].view(torch.int32)
            torch.testing.assert_close(flags, first_flags(3), rtol=0, atol=0)


def is_joined(streams):
    """Whether the current stream waits for the end of the side stream."""
    end = streams["side"][-1]
    return end.kind == "mark" and ("wait for mark", end.what) in [
        operation[:2] for operation in streams["current"]
    ]


def test_in_a_graph_the_side_stream_joins_the_current_one():
    joined = []
    for seed in SEEDS:
        for gpu_class in (Capturing, Gpu):
            machine, notes = Machine(3), Notes()
            Player(gpu_class(machine, 0), notes).play(make_program(seed, 3))
            streams = machine.streams[0]
            if streams["side"]:
                joined.append((gpu_class, is_joined(streams)))
            assert gpu_class is Gpu or not notes.told  # which could not look into a graph
    assert (Capturing, False) not in joined
    assert {(Capturing, True), (Gpu, False)} <= set(joined)


class Hoarder(Gpu):
    """A GPU whose old buffers stay, as those of a real one do until nothing waits any more."""

    def allocate(self, size_bytes):
        buffer = super().allocate(size_bytes)
        self.buffers = [*getattr(self, "buffers", []), buffer]
        return buffer


def first_awaited(seed, world, ranks, lost, turns):
    """What each rank but `lost`, which stops after some turns, waits for first, or None."""
    program, machine = make_program(seed, world), Machine(world)
    notes = [Notes() for _ in range(world)]
    for rank in range(world):
        player = Player(Hoarder(machine, rank), notes[rank], ranks)
        player.play(program[:turns] if rank == lost else program)
    machine.run(random.Random(seed), until_stuck=True)
    return {
        rank: next((a for a in notes[rank].told if not a.has_come()), None)
        for rank in range(world) if rank != lost
    }  # fmt: skip


def test_a_rank_that_stops_is_named():
    world, ranks, whats = 4, (3, 5, 6, 9), set()
    for seed in SEEDS:
        lost = seed % world
        found = first_awaited(seed, world, ranks, lost, turns=2 + seed % 9)
        missing = {rank: a.missing() for rank, a in found.items() if a is not None}
        assert all(missing.values())  # who waits knows for whom
        # Some may wait for those who wait, but somebody waits for nobody but the lost one.
        assert not missing or [ranks[lost]] in missing.values()
        awaited = [(ranks[rank], a) for rank, a in found.items() if a is not None]
        assert all((a.rank, a.seconds) == (rank, 60) for rank, a in awaited)
        whats |= {a.what for _, a in awaited}
    before = "read what was published before in lane"
    assert whats == {f"{before} 'a'", f"{before} 'b'", "publish in lane 'a'", "publish in lane 'b'"}


def test_nothing_is_missing_once_it_has_come():
    machine, notes = Machine(2), Notes()
    for rank in range(2):
        Player(Gpu(machine, rank), notes if rank == 0 else Notes()).play(make_program(1, 2))
    assert notes.told and not any(awaited.has_come() for awaited in notes.told)
    machine.run(random.Random(0))
    assert all(awaited.has_come() for awaited in notes.told)
