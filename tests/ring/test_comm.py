import torch

from extend.ring.comm import RingComm, circulate
from extend.ring.layouts import LAYOUTS
from extend.ring.schedule import Schedule
from tests.spawn import spawn


def test_a_ring_of_one_sends_and_copies_nothing():
    comm = RingComm()  # no process group here
    assert (comm.rank, comm.world) == (0, 1)
    k, v = torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
    schedule = Schedule(LAYOUTS["zigzag"], 0, 1, 4, causal=True)
    [(step, keys, values)] = circulate(comm, schedule, k, v)
    assert step == 0 and keys is k and values is v


def test_a_ring_of_one_inside_a_larger_group():
    assert spawn(2, rank_and_world_of_a_lone_ring) == [(0, 1), (0, 1)]


def rank_and_world_of_a_lone_ring(rank, world):
    comm = RingComm.alone()
    return comm.rank, comm.world


def test_keys_of_every_rank_come_by_once():
    # Rank r meets the keys of r, r - 1, r - 2.
    assert spawn(3, numbers_that_come_by) == [[0, 2, 1], [1, 0, 2], [2, 1, 0]]


def numbers_that_come_by(rank, world):
    k = torch.full((1, 1, 4, 2), float(rank))
    schedule = Schedule(LAYOUTS["zigzag"], rank, world, 4, causal=True)
    seen = []
    for _, keys, values in circulate(RingComm(), schedule, k, -k):
        assert (keys == -values).all()
        seen.append(int(keys[0, 0, 0, 0]))
    return seen


def test_a_ring_over_part_of_the_processes():
    # Two rings side by side, of ranks 0, 2 and 1, 3: ranks inside a ring are those of its group.
    assert spawn(4, numbers_that_come_by_in_two_rings) == [[0, 2], [1, 3], [2, 0], [3, 1]]


def numbers_that_come_by_in_two_rings(rank, world):
    groups = [torch.distributed.new_group([0, 2]), torch.distributed.new_group([1, 3])]
    comm = RingComm(groups[rank % 2])
    assert (comm.rank, comm.world) == (rank // 2, 2)
    k = torch.full((1, 1, 4, 2), float(rank))
    schedule = Schedule(LAYOUTS["zigzag"], comm.rank, 2, 4, causal=True)
    return [int(keys[0, 0, 0, 0]) for _, keys, _ in circulate(comm, schedule, k, k)]
