import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from extend.errors import CompatibilityError, RankError
from extend.ring import agreement, exchange
from extend.ring.agreement import Agreement, agree, agree_on_call, sum_over
from extend.ring.comm import RingComm, subcomm
from tests.spawn import spawn


def error_of(kind, call, *args, **kwargs):
    with pytest.raises(kind) as error:
        call(*args, **kwargs)
    return str(error.value)


def agree_twice(rank, world):
    for length in (8, 16):
        agree(RingComm(), "attention", shape=(1, length), layout="zigzag")
    return True


def test_equal_facts_are_agreed_on():
    assert all(spawn(3, agree_twice))


def disagree(rank, world):
    comm = RingComm()
    local = 12 if rank == 1 else 16
    differ = {"window": 4} if rank == 2 else {}
    message = error_of(
        CompatibilityError, agree, comm, "attention", shape=(1, local), layout="zigzag", **differ
    )
    agree(comm, "attention", shape=(1, 16))  # and afterwards all is well again
    return message


def test_every_rank_is_told_each_difference():
    messages = spawn(3, disagree)
    assert len(set(messages)) == 1
    assert messages[0].startswith(
        "attention: the ranks disagree about shape: (1, 16) (ranks 0, 2), (1, 12) (rank 1); "
        "window: not given (ranks 0, 1), 4 (rank 2); "
    )
    assert "layout" not in messages[0]


def disagree_in_a_part(rank, world):
    part = subcomm(RingComm(), (1, 2)) if rank else RingComm.alone()
    if rank == 0:
        agree(part, "attention", rank=rank)  # a ring of one agrees with itself
        return None
    return error_of(CompatibilityError, agree, part, "attention", rank=rank)


def test_ranks_have_their_global_numbers():
    _, first, second = spawn(3, disagree_in_a_part)
    assert first == second and "rank: 1 (rank 1), 2 (rank 2)" in first


def call_different_things(rank, world):
    return error_of(CompatibilityError, agree, RingComm(), f"call {rank}", shape=(1, 16))


def test_different_calls_are_told_apart():
    first, second = spawn(2, call_different_things)
    assert first == second and "call 0 (rank 0); call 1 (rank 1)" in first


def stay_away(rank, world):
    comm = RingComm(timeout_seconds=0.3)
    message = error_of(RankError, agree, comm, "attention") if rank == 0 else None
    dist.barrier()
    return message


def test_a_rank_that_does_not_come_is_named():
    message, _, _ = spawn(3, stay_away)
    assert message.startswith(
        "rank 0: ranks 1, 2 of ranks 0, 1, 2 did not call attention within 0.3 s; "
    )


def check_often(rank, world):
    """Ranks that have agreed on a call need not make it equally often."""
    for _ in range(5 if rank == 0 else 1):
        agree_on_call(RingComm(), shape=(1, 16), layout="zigzag")
    agree_on_call(RingComm(), shape=(1, 32), layout="zigzag")
    other = Agreement(RingComm(), "another call")  # the same facts, but nothing was agreed
    return error_of(CompatibilityError, other.check, (("shape", (1, 16)), ("rank", rank)))


def test_a_call_is_agreed_on_once():
    first, second = spawn(2, check_often)
    assert first == second and "rank: 0 (rank 0), 1 (rank 1)" in first


def forget(rank, world):
    agreement.REMEMBERED = 2
    comm = RingComm()
    for length in (1, 2, 3):
        agree_on_call(comm, length=length)
    agree_on_call(comm, length=3)  # remembered: nobody need be there
    dist.barrier()
    if rank == 0:
        comm = RingComm(timeout_seconds=0.3)
    else:
        return None
    return error_of(RankError, agree_on_call, comm, length=1)


def test_the_oldest_call_is_forgotten_first():
    message, _ = spawn(2, forget)
    assert "rank 1 of ranks 0, 1 did not call ring_attention" in message


def keys_left(rank, world):
    before = _get_default_store().num_keys()
    for turn in range(20):
        agree(RingComm(), "attention", turn=turn)
    dist.barrier()
    return _get_default_store().num_keys() - before


def test_the_store_does_not_grow():
    # An entry of the last exchange for each rank.
    assert max(spawn(2, keys_left)) <= 2


def compare_long_values(rank, world):
    bounds = tuple(range(0, 10_000, 10))
    agree(RingComm(), "attention", cu_seqlens=bounds)
    mine = (*bounds[:-1], bounds[-1] + rank)
    return error_of(CompatibilityError, agree, RingComm(), "attention", cu_seqlens=mine)


def test_long_values_are_shown_in_part_but_compared_whole():
    message, _ = spawn(2, compare_long_values)
    assert "cu_seqlens: (0, 10, 20, " in message and message.count("sha256") == 2
    assert len(message) < 800


def add_up(rank, world):
    values = torch.tensor([0.1, 1e-9, 7.0]) * (rank + 1)
    return sum_over(RingComm(), values), sum_over(RingComm.alone(), values)


def test_sums_are_alike_to_the_last_bit():
    results = spawn(3, add_up)
    want = torch.tensor([0.1, 1e-9, 7.0]) * 6
    for rank, (total, own) in enumerate(results):
        # fp32 sums of three numbers.
        torch.testing.assert_close(total, want, rtol=3e-7, atol=0)
        torch.testing.assert_close(total, results[0][0], rtol=0, atol=0)
        torch.testing.assert_close(own, torch.tensor([0.1, 1e-9, 7.0]) * (rank + 1))


class Unreachable:
    """A store whose process is gone."""

    def check(self, keys):
        raise RuntimeError("Broken pipe")


def test_a_store_that_is_gone_is_not_blamed_on_a_rank(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    error = exchange._explain(
        RuntimeError("Broken pipe\nat ..."), Unreachable(), {3: "a", 4: "b"}, "attention", None
    )
    assert isinstance(error, RankError)
    assert str(error).startswith("attention: rank 3 cannot reach the store")
    assert "(Broken pipe)" in str(error)
