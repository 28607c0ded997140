"""What the cost model knows of a machine: rates of attention kernels, links and memory.

Units are FLOP/s, bytes/s, seconds and bytes. A causal square of side L counts L * L / 2 (query,
key) pairs and a rectangle q * k; a pair costs 4 * head_dim FLOP a head forward (two products) and
10 * head_dim backward (five). The length of a rectangle is the harmonic mean of its sides, so that
a square's is its side.

The presets are least squares fits (`fit`) to medians measured on H200, or published throughputs
where their comment says so. A calibration on the machine itself is better than any of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from extend.errors import CompatibilityError


@dataclass(frozen=True)
class Rate:
    """A kernel's speed on blocks of one length L: peak * L / (L + half).

    Attributes:
        peak: FLOP/s on endless blocks, at the clock that a long run settles at.
        half: the length, in tokens, at which half of `peak` is reached.
    """

    peak: float
    half: float

    def seconds(self, flops: float, length: float) -> float:
        """Time for `flops` on blocks of `length` tokens."""
        return flops / self.peak * (1 + self.half / length)


@dataclass(frozen=True)
class KernelRates:
    """Rates of one kernel; `bands`: it takes a bottom-right causal rectangle in one call."""

    square: Rate
    rectangle: Rate
    square_backward: Rate
    rectangle_backward: Rate
    bands: bool = False


@dataclass(frozen=True)
class Link:
    """A way between GPUs.

    Attributes:
        bandwidth: bytes/s into one GPU, while all others receive as well.
        latency: seconds before the first byte, synchronisation included.
        steal: fraction of a hidden transfer's time by which it slows the kernel that hides it.
    """

    bandwidth: float
    latency: float
    steal: float

    def seconds(self, size_bytes: float) -> float:
        """Time of one transfer on an idle GPU."""
        return self.latency + size_bytes / self.bandwidth if size_bytes else 0.0


@dataclass(frozen=True)
class Hardware:
    """A machine as the cost model sees it.

    Attributes:
        name: shown in explanations.
        kernel: of the kernel that computes the blocks.
        pull: a copy engine reading a peer's memory inside a host.
        nccl: NCCL between GPUs of a host, overlapped with a kernel.
        inter: between hosts; each GPU has a network card of its own.
        memory_bandwidth: bytes/s that elementwise kernels reach (merging, packing).
        launch_seconds: what a kernel call adds to its work: launch, prologue, last wave.
    """

    name: str
    kernel: KernelRates
    pull: Link
    nccl: Link
    inter: Link
    memory_bandwidth: float
    launch_seconds: float = 1e-5

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Hardware":
        """The inverse of dataclasses.asdict, for hardware that was written to JSON."""
        kernel = {
            name: Rate(**value) if isinstance(value, Mapping) else value
            for name, value in fields["kernel"].items()
        }
        links = {name: Link(**fields[name]) for name in ("pull", "nccl", "inter")}
        return cls(**{**fields, **links, "kernel": KernelRates(**kernel)})


class Measurement(NamedTuple):
    """One median of a calibration.

    `kind` is a field of KernelRates (amount: FLOP, length: tokens), of Hardware's links (amount:
    bytes), or "memory_bandwidth" (amount: bytes read and written).
    """

    kind: str
    seconds: float
    amount: float
    length: float = 0.0


def harmonic(q_len: float, kv_len: float) -> float:
    """The length of a rectangle, in tokens."""
    return 2 * q_len * kv_len / (q_len + kv_len)


def fit(measurements: Iterable[Measurement], start: Hardware) -> Hardware:
    """`start` with everything that was measured put in its place.

    Least squares of relative errors. A kernel's time is amount * (x + y / length), a link's
    x + y * amount; a kind with one length or amount only, or whose fit is not physical, keeps
    `start`'s half or latency and gets the peak or bandwidth that fits best.

    Raises:
        CompatibilityError: a kind that is none, or a time or amount that is not positive.
    """
    groups: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        if measurement.seconds <= 0 or measurement.amount <= 0:
            raise CompatibilityError(
                f"calibration: {measurement.kind} took {measurement.seconds} s for "
                f"{measurement.amount}; pass positive times and amounts"
            )
        groups.setdefault(measurement.kind, []).append(measurement)
    rates, rest = {}, {}
    for kind, group in groups.items():
        if kind in ("square", "rectangle", "square_backward", "rectangle_backward"):
            rates[kind] = _fit_rate(group, getattr(start.kernel, kind))
        elif kind in ("pull", "nccl", "inter"):
            rest[kind] = _fit_link(group, getattr(start, kind))
        elif kind == "memory_bandwidth":
            rest[kind] = 1 / _scale([(m.amount, m.seconds) for m in group])
        else:
            raise CompatibilityError(f"calibration: unknown kind {kind!r} of measurement")
    return replace(start, kernel=replace(start.kernel, **rates), **rest)


def _fit_rate(group: Sequence[Measurement], start: Rate) -> Rate:
    x, y = _two_terms([(m.amount, m.amount / m.length, m.seconds) for m in group])
    if x > 0 and y >= 0:
        return Rate(peak=1 / x, half=y / x)
    if x > 0:  # no slower on short blocks: there is no half to see
        return Rate(1 / _scale([(m.amount, m.seconds) for m in group]), half=0.0)
    scaled = [(m.amount * (1 + start.half / m.length), m.seconds) for m in group]
    return replace(start, peak=1 / _scale(scaled))


def _fit_link(group: Sequence[Measurement], start: Link) -> Link:
    x, y = _two_terms([(1.0, m.amount, m.seconds) for m in group])
    if x >= 0 and y > 0:
        return replace(start, latency=x, bandwidth=1 / y)
    after = [(m.amount, max(m.seconds - start.latency, m.seconds / 2)) for m in group]
    return replace(start, bandwidth=1 / _scale(after))


def _two_terms(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """x and y of seconds = a * x + b * y, least relative errors; (-1, 0) if undetermined."""
    scaled = [(a / seconds, b / seconds) for a, b, seconds in rows]
    aa, bb = sum(a * a for a, _ in scaled), sum(b * b for _, b in scaled)
    ab = sum(a * b for a, b in scaled)
    a1, b1 = sum(a for a, _ in scaled), sum(b for _, b in scaled)
    determinant = aa * bb - ab * ab
    if determinant <= 1e-9 * aa * bb:
        return -1.0, 0.0
    return (a1 * bb - b1 * ab) / determinant, (b1 * aa - a1 * ab) / determinant


def _scale(rows: Sequence[tuple[float, float]]) -> float:
    """x of seconds = a * x with the least relative errors."""
    ratios = [a / seconds for a, seconds in rows]
    return sum(ratios) / sum(r * r for r in ratios)


def find_hardware(gpu: str, kernel: str = "auto") -> Hardware:
    """The preset nearest to a GPU called `gpu` and a kernel of extend.ring.kernels.

    `gpu` is a key of HARDWARE or what torch.cuda.get_device_name() says; an unknown GPU counts as
    an H200, an unknown kernel as the GPU's default. Names never fail: what the model ranks are
    strategies on one machine, and these hardly change places between GPUs of one generation.
    """
    lowered = gpu.lower()
    name = next((name for name in HARDWARE if name in lowered), "h200")
    kernels = AMPERE if name == "a100" else HOPPER
    found = HARDWARE[name]
    return replace(found, kernel=kernels.get(kernel, found.kernel))


# Fitted on H200 (torch 2.11, cuDNN 9.19, FA4 4.0.0b36, 32:8 heads, head_dim 128, bf16): half
# lengths on squares of 4K to 64K on one GPU; peaks, as a hot GPU reaches them, on ring, all-gather
# and Ulysses over two GPUs at 32K to 128K (docs/results/ring/2xh200-peers.json). Worst residual
# there 10 % forward, 4 % with backward; a GPU's clock drifts by 10 %. Rectangles carry what a block
# costs besides. Flash rectangles were not timed: cuDNN's ratio to squares in short runs stands in.
HOPPER: dict[str, KernelRates] = {
    "cudnn": KernelRates(
        Rate(602e12, 694), Rate(622e12, 0), Rate(521e12, 1014), Rate(492e12, 0)
    ),
    "flash": KernelRates(
        Rate(343e12, 547), Rate(362e12, 0), Rate(325e12, 772), Rate(335e12, 0), bands=True
    ),
    "fa4": KernelRates(
        Rate(648e12, 0), Rate(638e12, 0), Rate(580e12, 271), Rate(548e12, 0)
    ),
}  # fmt: skip

# From the one-GPU columns of zhuzilin/ring-flash-attention's README (8K: 205 TFLOP/s forward, 182
# with backward) and of BurstAttention's (64K: 217 and 199).
AMPERE: dict[str, KernelRates] = {
    "flash": KernelRates(
        Rate(217e12, 466), Rate(229e12, 0), Rate(193e12, 855), Rate(199e12, 0), bands=True
    ),
}  # fmt: skip

# Copies between two H200 (NVLink, 450 GB/s each way): pulled by copy engines 347 GB/s at 32 MiB and
# 371 at 256, next to a kernel that they slowed by 4 %; NCCL 306 GB/s at 256 MiB, and the kernel
# beside it took almost that much longer. Waiting for another rank is put at 20 us. Hosts: 400 Gb/s
# InfiniBand a GPU, of which NCCL gets 45 GB/s (assumed). Other GPUs: scaled by NVLink and memory
# bandwidth (assumed).
NVLINK_450 = Link(370e9, latency=2e-5, steal=0.05), Link(305e9, latency=3e-5, steal=0.8)
NVLINK_300 = Link(250e9, latency=2e-5, steal=0.05), Link(205e9, latency=3e-5, steal=0.8)
NVLINK_200 = Link(165e9, latency=2e-5, steal=0.05), Link(135e9, latency=3e-5, steal=0.8)
INFINIBAND_400 = Link(45e9, latency=3e-5, steal=0.3)
INFINIBAND_200 = Link(22e9, latency=3e-5, steal=0.3)

HARDWARE: dict[str, Hardware] = {
    "h200": Hardware("H200", HOPPER["cudnn"], *NVLINK_450, INFINIBAND_400, 4.0e12),
    "h100": Hardware("H100", HOPPER["cudnn"], *NVLINK_450, INFINIBAND_400, 2.8e12),
    "h800": Hardware("H800", HOPPER["cudnn"], *NVLINK_200, INFINIBAND_400, 2.8e12),
    "a100": Hardware("A100", AMPERE["flash"], *NVLINK_300, INFINIBAND_200, 1.7e12),
}
