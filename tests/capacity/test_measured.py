"""Steps that were measured on two GPUs, a Llama-3.1-8B shape in bf16; see docs/planning.md."""

from dataclasses import dataclass

import pytest

from extend.capacity import GIB, GPUS, Machine, Setup, plan_memory, plan_time
from extend.capacity.setup import auto_tile
from tests.capacity.test_planner import SHAPE


@dataclass(frozen=True)
class Measured:
    """One configuration; `host` is in bytes for both processes.

    `chunk_bytes` is what the loss held for each logit of a chunk when that was measured: at commit
    4072b44 logits and gradient of two chunks, at 2340211 one more gradient than today. Both saved
    the product of each MLP that was not computed again, which 288b6c8 no longer does.
    """

    gpu: str
    length: int
    recomputed: int
    strategy: str
    kernel: str
    peak_gib: float
    seconds: float
    compiled: bool = True
    host: int = 0
    chunk_bytes: int = 12
    saves_product: bool = True

    def setup(self) -> Setup:
        return Setup(length=self.length, cp=2, recomputed=self.recomputed, compiled=self.compiled,
                     strategy=self.strategy, host_bytes=self.host,
                     tile=auto_tile(self.length // 2))


MEASURED = [
    Measured("h200", 65536, 32, "ulysses", "cudnn", 51.135, 7.748, compiled=False),
    Measured("h200", 65536, 32, "ulysses", "cudnn", 49.582, 7.328),
    Measured("h200", 131072, 24, "ulysses", "cudnn", 130.478, 21.937),
    Measured("h200", 131072, 32, "ring", "cudnn", 68.402, 21.004),
    Measured("h200", 262144, 32, "ulysses", "cudnn", 54.931, 77.008, host=10**11),
    Measured("h200", 65536, 12, "ulysses", "fa4", 129.590, 6.877),
    Measured("h200", 65536, 12, "ring", "cudnn", 124.590, 6.778),
    Measured("h200", 65536, 12, "ring", "fa4", 124.590, 6.339),
    Measured("h200", 131072, 26, "ring", "fa4", 111.481, 19.429),
    Measured("h200", 65536, 12, "ring", "fa4", 123.608, 6.197, chunk_bytes=10),
    Measured("h200", 131072, 25, "ring", "fa4", 117.999, 19.115, chunk_bytes=10),
    Measured("h200", 65536, 6, "ring", "fa4", 122.381, 6.065, chunk_bytes=8, saves_product=False),
    Measured("h200", 131072, 22, "ring", "fa4", 123.535, 18.843, chunk_bytes=8,
             saves_product=False),
    Measured("h200", 262144, 29, "ring", "fa4", 111.800, 66.163, chunk_bytes=8,
             saves_product=False),
    Measured("h100", 65536, 32, "ulysses", "cudnn", 51.135, 7.815, compiled=False)]


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_peak_memory(row):
    """Every term is counted: what is left is rounding and small tensors, 10 MiB."""
    found = plan_memory(SHAPE, row.setup())
    more = (row.chunk_bytes - 8) * 4096 * SHAPE.vocab
    if row.saves_product and row.setup().used_tile is None:
        more += (32 - row.recomputed) * 2 * SHAPE.active_inner * row.length // 2
    peak = max(moment.total + more * (moment.name == "head") for moment in found.moments)
    assert peak / GIB == pytest.approx(row.peak_gib, abs=0.01)


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_seconds(row):
    """5 %: rates are of a GPU whose clock drifts by as much."""
    found = plan_time(SHAPE, row.setup(), Machine(gpu=row.gpu, num_gpus=2), GPUS[row.gpu],
                      row.kernel)
    assert found.seconds == pytest.approx(row.seconds, rel=0.05)


def test_page_locked_memory():
    """What one process of the 256K row had pinned."""
    found = plan_memory(SHAPE, MEASURED[4].setup())
    assert found.host_bytes / GIB == pytest.approx(46.5, abs=0.07)
