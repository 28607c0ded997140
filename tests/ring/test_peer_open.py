"""Whether the peer transport can be used: facts, the probe, and one answer for all ranks."""

import threading
import time
from datetime import timedelta

import pytest
import torch

from extend.ring import peer_open
from extend.ring.peer_cuda import Flags
from extend.ring.peer_open import Facts, open_peers, probe, refusal
from tests.spawn import spawn

MINUTE = timedelta(seconds=60)


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
    """Memory of one rank that is a thread, which waits as a stream does."""

    def __init__(self, memory, flags, rank):
        self.memory, self.flags, self.rank = memory, flags, rank
        self.others = [r for r in range(len(flags)) if r != rank]

    def view(self, owner, shape, dtype):
        return self.memory[owner][: shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def take(self, what, others):
        mine = getattr(self.flags[self.rank], what)
        deadline = time.monotonic() + 20
        while not all(mine[other] for other in others):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for other in others:
            mine[other] = False

    def wait_until_read(self):
        self.take("read", self.others)

    def say_written(self):
        for other in self.others:
            self.flags[other].written[self.rank] = True

    def wait_until_written(self, owner):
        self.take("written", [owner])

    def say_read(self, owner):
        self.flags[owner].read[self.rank] = True

    def look(self):
        return self.flags[self.rank]


class Mute(ThreadBuffer):
    def say_written(self):
        pass


class Ungrateful(ThreadBuffer):
    def say_read(self, owner):
        pass


class Blind(ThreadBuffer):
    def look(self):
        return None


def probe_all(shared=True, last=ThreadBuffer):
    """What a probe finds on ranks 4, 6 and 9; the buffer of rank 9 may be a special one."""
    ranks, found = (4, 6, 9), {}
    memories = [torch.zeros(3, 64, dtype=torch.uint8) for _ in ranks]
    flags = [Flags([False] * 3, [True] * 3) for _ in ranks]

    def work(place):
        kind = last if place == 2 else ThreadBuffer
        buffer = kind(memories[0 if shared else place], flags, place)
        found[ranks[place]] = probe(buffer, place, ranks, 0.5)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_probe_finds_nothing_wrong_where_nothing_is():
    assert probe_all() == {4: "", 6: "", 9: ""}


def test_a_probe_notices_memory_that_is_not_shared():
    assert probe_all(shared=False)[6] == "reads [0, 2, 0] where the ranks wrote [1, 2, 3]"


@pytest.mark.parametrize("fault", [Mute, Ungrateful])
def test_a_probe_notices_a_flag_that_does_not_come(fault):
    found = probe_all(last=fault)
    assert found[4] == found[6] == "no flag comes from rank 9"


def test_a_probe_gives_up_where_flags_cannot_be_looked_at():
    assert probe_all(last=Blind)[9] == "no flag comes from ranks 4, 6"


class OneThatFails:
    """A device without symmetric memory on rank 1."""

    def __init__(self, group_name, seats, rank):
        assert (group_name, seats) == ("name", [1, 0])
        assert rank == 1 - torch.distributed.get_rank()

    def allocate(self, size_bytes):
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("not on this GPU\nand a stack of C++ frames")
        return "never looked at"


def no_driver():
    """As ctypes says it."""
    raise OSError("libcuda.so.1: cannot open shared object file")


def open_where_one_fails(rank, world, fails_early):
    peer_open.CudaDevice, peer_open.load_driver = OneThatFails, lambda: None
    if fails_early and rank == 1:
        peer_open.load_driver = no_driver

    def group_name():
        assert not fails_early  # for which the ranks would wait for each other
        return "name"

    return open_peers(group_name, (1, 0), (0, 1), 1 - rank, MINUTE)


@pytest.mark.parametrize("fails_early", [True, False], ids=["driver", "memory"])
def test_a_failure_of_one_rank_decides_for_all(fails_early):
    (first, reason), second = spawn(2, open_where_one_fails, fails_early)
    assert first is None and second == (None, reason)
    what = "libcuda.so.1" if fails_early else "not on this GPU)"
    assert reason.startswith("rank 1: no symmetric memory (") and what in reason
