import gc
import os
import re
import time
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from extend.errors import CompatibilityError, RankError, RecipeError
from extend.ring.comm import RingComm, subcomm
from tests.spawn import PRELOAD, spawn

ROWS, COLUMNS = 6, 8


def published(rank, dtype=torch.int64):
    """What a rank offers: no number is on two ranks or in two places."""
    return (torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) + 100 * rank).to(dtype)


def whole(buffer, receiver):
    return buffer


def rows_of_receiver(buffer, receiver):
    return buffer[receiver : receiver + 2]


def column_of_receiver(buffer, receiver):
    return buffer[:, receiver]


def for_even_receivers(buffer, receiver):
    return buffer[1:] if receiver % 2 == 0 else None


def no_rows_for_even_receivers(buffer, receiver):
    return buffer[:0] if receiver % 2 == 0 else buffer[3:]


SELECTS = (
    whole, rows_of_receiver, column_of_receiver, for_even_receivers, no_rows_for_even_receivers,
)  # fmt: skip


def expected(select, step, rank, world, dtype=torch.int64):
    """What arrives at `rank`, by the definition of a fetch; None for nothing."""
    found = select(published((rank - step) % world, dtype), rank)
    return None if found is None or not found.numel() else found.clone()


def room(like, strided):
    """Memory for `like`, filled with a number that is nowhere published."""
    if like is None:
        return None
    into = torch.full((*like.shape, 2) if strided else like.shape, -1, dtype=like.dtype)
    return into[..., 1] if strided else into


def everything_once(rank, world, strided):
    """Fetch each selection from each rank, one at a time."""
    comm, got = RingComm(), {}
    mine = published(rank)
    for select in SELECTS:
        window = comm.publish("lane", mine.shape, mine, lambda buffer: buffer.copy_(mine))
        for step in range(world):
            into = room(expected(select, step, rank, world), strided)
            window.fetch(step, into, select).wait()
            got[select.__name__, step] = into
    return got


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_selection_arrives_from_every_rank(world, strided):
    for rank, got in enumerate(spawn(world, everything_once, strided)):
        for select in SELECTS:
            for step in range(world):
                want = expected(select, step, rank, world)
                torch.testing.assert_close(got[select.__name__, step], want)


def everything_together(rank, world, dtype):
    """All selections from all ranks as one transfer, in a lane of the given dtype."""
    comm = RingComm()
    window = comm.publish_tensor("lane", published(rank, dtype))
    requests = [
        (step, room(expected(select, step, rank, world, dtype), step % 2 == 1), select)
        for step in range(world) for select in SELECTS
    ]  # fmt: skip
    window.fetch_all(requests).wait()
    return [into for _, into, _ in requests]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_several_fetches_are_one_transfer(dtype):
    for rank, got in enumerate(spawn(3, everything_together, dtype)):
        want = [expected(s, step, rank, 3, dtype) for step in range(3) for s in SELECTS]
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def overlapping_fetches(rank, world):
    """Two lanes, one of them published twice, and nothing waited for until all is under way."""
    comm, got, transfers = RingComm(), [], []
    for lane, factor in (("a", 1), ("b", 2), ("a", 3)):
        mine = factor * published(rank)
        window = comm.publish(lane, mine.shape, mine, lambda buffer, mine=mine: buffer.copy_(mine))
        for step in range(1, world):
            got.append(torch.empty_like(mine))
            transfers.append(window.fetch(step, got[-1], whole))
    for transfer in reversed(transfers):
        transfer.wait()
        transfer.wait()  # once more does no harm
    return got


def test_fetches_overlap_and_a_lane_can_be_published_again():
    for rank, got in enumerate(spawn(3, overlapping_fetches)):
        want = [f * expected(whole, step, rank, 3) for f in (1, 2, 3) for step in (1, 2)]
        torch.testing.assert_close(got, want)


def misuses(rank, world):
    comm, mine = RingComm(), published(rank)
    window = comm.publish_tensor("lane", mine)
    messages = []
    for into in (torch.empty(2, 2, dtype=mine.dtype), torch.empty(mine.shape), None):
        with pytest.raises(ValueError) as error:
            window.fetch(1, into, whole)
        messages.append(str(error.value))
    comm.publish_tensor("other", mine)
    window.fetch(1, torch.empty_like(mine), whole).wait()  # other lanes do not matter
    newest = comm.publish_tensor("lane", mine)
    newest.close()
    for late in (window, newest):
        with pytest.raises(RuntimeError) as error:
            late.fetch(1, torch.empty_like(mine), whole)
        messages.append(str(error.value))
    return messages


def test_a_wrong_fetch_is_refused_before_anything_is_sent():
    for shape, dtype, nothing, stale, closed in spawn(2, misuses):
        assert "(6, 8)" in shape and "into ((2, 2)" in shape and "'lane'" in shape
        assert "float32" in dtype and "int64" in dtype
        assert "into None" in nothing
        assert "'lane' was published again" in stale
        assert "'lane': fetch after close" in closed


def reuse_of_what_was_written(rank, world):
    comm, mine = RingComm(), published(rank)
    window = comm.publish("lane", mine.shape, mine, lambda buffer: buffer.copy_(mine))
    mine.fill_(-1)
    into = torch.empty_like(mine)
    transfer = window.fetch(1, into, whole)
    window.close()
    window.close()  # once more does no harm
    transfer.wait()
    return into


def test_what_was_written_may_be_overwritten_and_a_window_closed_at_once():
    for rank, into in enumerate(spawn(2, reuse_of_what_was_written)):
        torch.testing.assert_close(into, published(1 - rank))


def contiguous_memory(rank, world):
    """Whether the buffer of a published tensor is the tensor's own memory."""
    comm, same = RingComm(), []

    def select(buffer, receiver):
        same.append(buffer.data_ptr() == tensor.data_ptr())
        return None

    for tensor in (published(rank), published(rank).t()):
        comm.publish_tensor("lane", tensor).fetch(1, None, select).wait()
    return same


def test_messages_take_a_contiguous_tensor_as_it_is():
    # Asked twice each, as a receiver and as a sender.
    assert spawn(2, contiguous_memory) == 2 * [[True, True, False, False]]


def what_two_rings_fetch(rank, world, split):
    members = [rank % 2, rank % 2 + 2]
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    comm = subcomm(RingComm(), members) if split else RingComm(groups[rank % 2])
    into = torch.empty_like(published(rank))
    comm.publish_tensor("lane", published(rank)).fetch(1, into, whole).wait()
    back = torch.empty_like(into)
    RingComm().publish_tensor("lane", into).fetch(1, back, whole).wait()
    return comm.rank, comm.world, comm.ranks, into, back


@pytest.mark.parametrize("split", [False, True], ids=["groups", "subcomms"])
def test_rings_over_part_of_the_processes(split):
    # Two rings side by side, of ranks 0, 2 and 1, 3: ranks inside a ring count from 0.
    for rank, (place, size, ranks, into, back) in enumerate(
        spawn(4, what_two_rings_fetch, split)
    ):
        assert (place, size, ranks) == (rank // 2, 2, (rank % 2, rank % 2 + 2))
        torch.testing.assert_close(into, published((rank + 2) % 4))
        torch.testing.assert_close(back, published((rank - 1 + 2) % 4))


def look_around(rank, world):
    comm = RingComm()
    with pytest.raises(ValueError, match="not a member"):
        subcomm(comm, [1 - rank])
    other = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="not in the group"):
            RingComm(other)
    timeouts = [c.timeout.total_seconds() for c in (comm, RingComm(timeout_seconds=2))]
    return comm.hosts, comm.transport, comm.transport_reason, timeouts


def test_what_a_comm_knows():
    reason = "the group's backend is gloo, which moves tensors on the CPU"
    assert spawn(2, look_around) == 2 * [(1, "p2p", reason, [60, 2])]


def members_in_another_order(rank, world):
    comm = RingComm()
    assert subcomm(comm, range(world)) is comm and subcomm(comm, [rank]).world == 1
    turned = subcomm(comm, (2, 1, 0))
    into = torch.empty_like(published(rank))
    turned.publish_tensor("lane", published(rank)).fetch(1, into, whole).wait()
    return turned.rank, into


def test_a_part_has_the_order_of_its_members():
    for rank, (place, into) in enumerate(spawn(3, members_in_another_order)):
        assert place == 2 - rank
        torch.testing.assert_close(into, published((rank + 1) % 3))


def forget_a_group(rank, world):
    group = dist.new_group([0, 1])
    comm = RingComm(group)
    comm.publish_tensor("lane", torch.zeros(1)).fetch(1, torch.zeros(1), whole).wait()
    known = weakref.ref(comm.link)
    dist.destroy_process_group(group)
    del comm, group
    gc.collect()
    return known() is None


def test_what_is_known_of_a_group_goes_with_it():
    assert all(spawn(2, forget_a_group))


def refuse_peer(rank, world):
    comm = RingComm(transport="peer")
    with pytest.raises(CompatibilityError, match=r"'peer' does not work.*backend is gloo"):
        comm.publish("lane", (2,), torch.zeros(2), lambda buffer: None)
    with pytest.raises(RecipeError, match="did you mean 'peer'"):
        RingComm(transport="pear")
    return True


def test_the_peer_transport_is_refused_where_there_is_no_gpu():
    assert all(spawn(2, refuse_peer))


def test_a_ring_of_one_fetches_from_itself():
    comm = RingComm()  # no process group here
    assert (comm.rank, comm.world, comm.hosts, comm.transport) == (0, 1, 1, "p2p")
    mine, into = published(0), room(published(0), strided=True)
    comm.publish("lane", mine.shape, mine, lambda buffer: buffer.copy_(mine)).fetch(
        0, into, whole
    ).wait()
    torch.testing.assert_close(into, mine)


def rank_and_world_of_a_lone_ring(rank, world):
    comm = RingComm.alone()
    return comm.rank, comm.world


def test_a_ring_of_one_inside_a_larger_group():
    assert spawn(2, rank_and_world_of_a_lone_ring) == [(0, 1), (0, 1)]


def start(rank, world, directory, scene):
    """Play one rank of a scene in which somebody fails; what it raises goes into a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=world)
    message, ended = "", False
    try:
        scene(rank, world, lambda others: await_files(directory, others))
    except RankError as error:
        message = str(error)
    except SystemExit:
        ended = True
    (directory / f"rank_{rank}").write_text(message)
    if not ended:  # who ends early is dead to the others
        await_files(directory, range(world))
    os._exit(0)


def await_files(directory, ranks):
    """Wait until each of `ranks` has nothing more to do."""
    while not all((directory / f"rank_{rank}").exists() for rank in ranks):
        time.sleep(0.01)


def play(scene, world, directory):
    """What each rank raised, or an empty string."""
    mp.set_forkserver_preload(PRELOAD)
    mp.start_processes(start, (world, directory, scene), nprocs=world, start_method="forkserver")
    return [(directory / f"rank_{rank}").read_text() for rank in range(world)]


def from_all_others(comm):
    mine = torch.zeros(1 << 16)
    window = comm.publish_tensor("keys", mine)
    return window.fetch_all(
        [(step, torch.empty_like(mine), whole) for step in range(1, comm.world)]
    )


def one_rank_is_slow(rank, world, await_end_of):
    comm = RingComm(timeout_seconds=1)
    from_all_others(comm).wait()  # the first time all is well
    if rank == 1:
        await_end_of([0, 2])
    else:
        from_all_others(comm).wait()


def test_a_slow_rank_is_named(tmp_path):
    first, slow, last = play(one_rank_is_slow, 3, tmp_path)
    assert not slow
    for rank, message in ((0, first), (2, last)):
        assert re.match(rf"rank {rank} has not heard from rank 1 after \d+\.\d s, ", message)
        assert "fetching 'keys', steps 1, 2;" in message and "time-out of 1 s" in message


def one_rank_exits(rank, world, await_end_of):
    comm = RingComm()  # the time-out is half an hour
    from_all_others(comm).wait()
    if rank == 2:
        raise SystemExit
    from_all_others(comm).wait()


def test_a_dead_rank_is_named_long_before_the_time_out(tmp_path):
    first, second, _ = play(one_rank_exits, 3, tmp_path)
    for rank, message in ((0, first), (1, second)):
        assert f"rank {rank} has not heard from rank 2 after " in message
        assert "look for the first error in its log" in message


def a_rank_of_a_subgroup_is_slow(rank, world, await_end_of):
    group = dist.new_group([1, 2])
    if rank == 1:
        from_all_others(RingComm(group, timeout_seconds=0.5)).wait()
    else:
        await_end_of([1])


def test_ranks_are_named_by_their_global_number(tmp_path):
    _, message, _ = play(a_rank_of_a_subgroup_is_slow, 3, tmp_path)
    assert "rank 1 has not heard from rank 2 after" in message and "step 1;" in message
