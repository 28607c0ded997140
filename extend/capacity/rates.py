"""What GPUs reach in a training step: the constants of the time model, and where they come from.

Everything is a rate as a step reaches it, on a GPU warm from the work before, not a data sheet's;
`peak_flops` alone is the data sheet's, for MFU. Attention has its own rates in
`extend.ring.cost.hardware`.
"""

from dataclasses import dataclass, replace

from extend.registry import lookup


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRates:
    """Of one kind of GPU.

    Attributes:
        name: as its maker calls it.
        memory_gib: as torch sees it.
        peak_flops: bf16, dense, by the data sheet.
        matmul_flops: of bf16 matrix products.
        traffic: bytes/s of what is not a matrix product, each value counted as often as it must be
            read or written.
        host_link: bytes/s between a GPU and page-locked host memory, one way.
        host_steal: seconds that the step takes longer for each second of such copies beside it.
        exchange_seconds: what exchanging heads costs a layer and step beyond ring/cost's count.
        spread: by how much the seconds of a step may be off, as a fraction.
        source: where it was measured.
    """

    name: str
    memory_gib: float
    peak_flops: float = 989e12
    matmul_flops: float = 695e12
    traffic: float = 2.2e12
    host_link: float = 50e9
    host_steal: float = 0.4
    exchange_seconds: float = 0.008
    spread: float = 0.10
    source: str = ""


_H200 = GpuRates(
    name="H200", memory_gib=139.8,
    source="2 x H200, torch 2.11, Llama-3.1-8B shape, 64K and 128K rows: kernel seconds by kind "
           "(docs/planning.md)")
_SCALED = "scaled by data sheet from the H200, not measured"

GPUS: dict[str, GpuRates] = {
    "h200": _H200,
    "h100": replace(_H200, name="H100 80GB", memory_gib=79.2,
                    source="the H200's: 2 x H100, torch 2.11, took 7.81 s for a 64K row where "
                           "2 x H200 took 7.75 (docs/results/train)"),
    "h800": replace(_H200, name="H800", memory_gib=79.2, traffic=1.6e12, spread=0.3,
                    source=_SCALED),
    "a100": replace(_H200, name="A100 80GB", memory_gib=79.2, peak_flops=312e12,
                    matmul_flops=240e12, traffic=1.0e12, host_link=24e9, spread=0.3,
                    source=_SCALED),
    "b200": replace(_H200, name="B200", memory_gib=178.0, peak_flops=2250e12,
                    matmul_flops=1450e12, traffic=3.3e12, spread=0.5, source=_SCALED)}


def gpu_rates(gpu: str) -> GpuRates:
    """Of a kind of GPU by its key.

    Raises:
        RecipeError: no such key.
    """
    return lookup(GPUS, gpu.lower(), "--gpu")
