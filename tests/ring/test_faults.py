"""The suite must notice a wrong ring: each fault planted here has to change the result."""

import pytest
import torch

from extend.ring import LAYOUTS, call, unshard
from extend.ring.comm import Transfer
from extend.ring.mask import CAUSAL, FULL
from extend.ring.strategies import ring
from tests.ring.oracle import exact, make_inputs, run_ring, tolerance
from tests.spawn import spawn

WORLD = 4


def off_by_one(rank):
    """Zigzag's mirrored piece starts one position early on one rank."""
    honest = LAYOUTS["zigzag"].runs

    def runs(seq_len, rank, world):
        head, *tail = honest(seq_len, rank, world)
        if rank == 1:
            tail = [t._replace(start=t.start - 1) for t in tail]
        return (head, *tail)

    object.__setattr__(LAYOUTS["zigzag"], "runs", runs)
    call._runs.cache_clear()
    call._tiles.cache_clear()


def wrong_causal_flag(rank):
    """Every causal block is computed as if it were full."""
    honest = call._tiles

    def tiles(*args):
        return tuple(t._replace(mask=FULL) if t.mask == CAUSAL else t for t in honest(*args))

    call._tiles = tiles


def stale_buffer(rank):
    """One rank computes on what was in the buffer before the fetch."""
    honest = ring.Ring._fetch

    def fetch(self, window, turn, step, k):
        transfer, block = honest(self, window, turn, step, k)
        if rank == 2 and step == 2:
            transfer.wait()
            return Transfer(), torch.zeros_like(block)
        return transfer, block

    ring.Ring._fetch = fetch


def lost_share(rank):
    """One rank does not wait for a share of its gradients."""
    honest = ring.Homecoming.collect

    def collect(self):
        if rank == 0:
            self.transfer.wait()
            return None
        return honest(self)

    ring.Homecoming.collect = collect


def nothing(rank):
    """No fault: the control."""


FAULTS = {f.__name__: f for f in (off_by_one, wrong_causal_flag, stale_buffer, lost_share)}


def run_with(rank, world, fault):
    fault(rank)
    return run_ring(rank, world, make_inputs("GQA", "fp32"), strategy="ring", kernel="flash_cpu")


def compare(shards):
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        whole = unshard([part[i] for part in shards], 2, "zigzag").double()
        torch.testing.assert_close(
            whole, exact("GQA", "fp32", "causal")[i], rtol=0,
            atol=tolerance(name, "GQA", "fp32", "causal"),
        )  # fmt: skip


def test_without_a_fault_it_is_right():
    compare(spawn(WORLD, run_with, nothing))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault):
    shards = spawn(WORLD, run_with, FAULTS[fault])
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        compare(shards)


