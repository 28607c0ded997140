"""What one attention call costs under each strategy, predicted from a few measured rates.

    predict("ring", heads=32, kv_heads=8, head_dim=128, seq_len=131072, world=8).explain()

Assumptions. A rank is as fast as its own work: it waits for data, never for another rank's step.
Transfers of step t + 1 run beside the kernel of step t; what does not fit behind it is exposed, and
what fits slows it by the link's `steal`. Ranks are numbered host by host. All GPUs of a host
exchange at full bandwidth at once (a switch), and every GPU has a network card of its own. Inside a
host copy engines pull from the owner's memory, between hosts NCCL sends; gradients of keys go home
as `share_bytes` a value. The first keys are packed into a buffer for the others while the rank
computes on its own. Merging runs at memory bandwidth and hides behind nothing. The rank with the
most to do decides: of zigzag's ranks the first, which fetches whole blocks, or the last, which
merges whole ones. In the backward pass half of the rank's own block is left for the end, to hide
the last gradients' way home. All-gather takes its heads in as many groups as 2 GiB of keys ask for;
the next group's transfer hides behind kernels. Ulysses waits for the first of its groups of heads
to come and for the last to go back; the others' way hides behind kernels. Documents are of equal
length. Not modelled: throttling by power beyond what the fitted rates contain, waiting for
the process that launches the kernels (calls under 1 ms), other traffic.

Source: rates and links in hardware.py; `scripts/predict_ring.py` prints how far predictions are
from published tables and from runs on two H200.
"""

from dataclasses import dataclass
from functools import lru_cache

from extend.errors import CompatibilityError
from extend.registry import lookup
from extend.ring.cost.hardware import HARDWARE, Hardware
from extend.ring.cost.passes import (
    OURS,
    STRATEGIES,
    Cost,
    Implementation,
    Pass,
    exchanged,
    gather_groups,
)
from extend.ring.cost.workload import Call, kernel_seconds, whole


@dataclass(frozen=True)
class Prediction:
    """The cost of one call on the slowest rank; bytes are those that one rank receives.

    Attributes:
        seconds: all of it: compute + merge + exposed.
        compute_seconds: attention kernels, slowed by the transfers that they hide.
        merge_seconds: merging of partial results, packing for an exchange of heads.
        exposed_seconds: waiting for data.
        ideal_seconds: one GPU's time for the whole sequence, divided by the number of GPUs.
        bytes_intra: received from GPUs of the same host.
        bytes_inter: received from other hosts.
        peak_bytes: q, k, v, out, their gradients and all buffers, without the kernel's own.
    """

    strategy: str
    machine: str
    seconds: float
    compute_seconds: float
    merge_seconds: float
    exposed_seconds: float
    ideal_seconds: float
    bytes_intra: float
    bytes_inter: float
    peak_bytes: float

    @property
    def efficiency(self) -> float:
        """Fraction of the speed that one GPU's own kernel would give."""
        return self.ideal_seconds / self.seconds

    def explain(self) -> str:
        """One line for a log."""
        return (
            f"{self.strategy} on {self.machine}: {1e3 * self.seconds:.2f} ms = "
            f"{1e3 * self.compute_seconds:.2f} kernels + {1e3 * self.merge_seconds:.2f} merging + "
            f"{1e3 * self.exposed_seconds:.2f} waiting, {self.efficiency:.0%} of one GPU's speed; "
            f"{self.bytes_intra / 2**20:.0f} MiB from its host, {self.bytes_inter / 2**20:.0f} "
            f"from others; peak {self.peak_bytes / 2**30:.2f} GiB"
        )


@lru_cache(maxsize=4096)
def predict(
    strategy: str,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    seq_len: int,
    world: int,
    gpus_per_host: int = 8,
    layout: str = "zigzag",
    causal: bool = True,
    window: int | None = None,
    documents: int = 1,
    backward: bool = True,
    value_bytes: int = 2,
    batch: int = 1,
    hardware: Hardware = HARDWARE["h200"],
    implementation: Implementation = OURS,
) -> Prediction:
    """The cost of attention over `seq_len` tokens on `world` GPUs.

    Args:
        strategy: "ring", "all-gather", "ulysses", "usp:U" (groups of U ranks exchange heads, a ring
            runs over the groups) or "double-ring:H" (H hosts).
        heads: query heads of the model; `kv_heads` those of keys and values.
        seq_len: tokens of the whole sequence.
        gpus_per_host: ranks are numbered host by host.
        window: tokens that a query sees, its own included; None: all.
        documents: number of documents of equal length in the sequence.
        backward: forward and backward pass; otherwise forward alone.
        value_bytes: bytes of a value of q, k, v and out.

    Raises:
        RecipeError: no such strategy.
        CompatibilityError: the strategy cannot split these heads or ranks.
    """
    kind, degree = parse_strategy(strategy, heads, world)
    call = Call(
        heads, kv_heads, head_dim, seq_len / world, world, min(world, gpus_per_host), layout,
        causal, window or seq_len, seq_len / documents, value_bytes, batch,
    )  # fmt: skip
    cost, ideal = Cost(), 0.0
    alone = call._replace(rows=seq_len, world=1, near=1)
    for is_backward in (False, True)[: 1 + backward]:
        run = Pass(hardware, implementation, is_backward)
        ideal += kernel_seconds(alone, whole(alone), hardware, is_backward) / world
        cost += STRATEGIES[kind](call, run, degree)
    peak = _peak_bytes(kind, degree, call, implementation, backward, hardware.kernel.bands)
    hosts = -(-world // gpus_per_host)
    machine = f"{world} x {hardware.name}" + (f" in {hosts} hosts" if hosts > 1 else "")
    return Prediction(
        f"{strategy} ({layout})", machine, cost.seconds, cost.compute, cost.merge, cost.exposed,
        ideal, cost.intra, cost.inter, peak,
    )  # fmt: skip


def parse_strategy(strategy: str, heads: int, world: int) -> tuple[str, int]:
    """A strategy's family and degree, checked against the ranks and heads that it must split.

    Raises:
        RecipeError: no such strategy.
        CompatibilityError: the degree is missing, or does not divide the ranks or heads.
    """
    kind, _, number = strategy.partition(":")
    lookup(STRATEGIES, kind, "strategy")
    if kind not in ("usp", "double-ring"):
        degree = world if kind == "ulysses" else 1
    elif number.isdigit() and int(number) > 0:
        degree = int(number)
    else:
        raise CompatibilityError(f"strategy {strategy!r}: give a degree, such as {kind}:2")
    if world % degree:
        raise CompatibilityError(f"strategy {strategy!r}: {world} ranks do not divide by {degree}")
    if kind in ("usp", "ulysses") and heads % degree:
        raise CompatibilityError(
            f"strategy {strategy!r}: {heads} query heads do not divide over {degree} ranks; use "
            "ring or all-gather"
        )
    return kind, degree


def candidates(heads: int, world: int, gpus_per_host: int = 8) -> tuple[str, ...]:
    """The strategies that fit these heads and ranks; degrees as the hosts suggest."""
    names = ["ring", "all-gather", "ulysses"]
    names += [f"usp:{u}" for u in range(2, min(world // 2, gpus_per_host) + 1)]
    if world > gpus_per_host and world % gpus_per_host == 0:
        names.append(f"double-ring:{world // gpus_per_host}")
    return tuple(name for name in names if _fits(name, heads, world))


def _fits(strategy: str, heads: int, world: int) -> bool:
    try:
        parse_strategy(strategy, heads, world)
    except CompatibilityError:
        return False
    return True


def _peak_bytes(
    kind: str, degree: int, call: Call, how: Implementation, backward: bool, bands: bool
) -> float:
    """Tensors of one rank at the fullest moment, the kernel's own workspace left out."""
    copies = 2 if backward else 1  # of everything: itself and its gradient
    total = copies * _tensors(call) + call.rows * call.heads * call.batch * 4  # and lse
    if kind in ("ulysses", "usp"):
        call = exchanged(call, degree)
        total += copies * _tensors(call)
    if call.world == 1:
        return total
    block = call.rows * call.kv_values * call.value_bytes
    share = call.rows * call.kv_values * how.share_bytes if backward else 0.0
    wide = call.world > 2 or not how.is_frugal  # sums in fp32
    total += call.rows * call.q_values * (call.value_bytes + 4 * wide)  # a block's result, the sum
    total += call.rows * call.kv_values * (4 if wide else call.value_bytes) * backward
    if kind == "all-gather":  # gathered: computed and on its way; shares: the result and two lanes
        groups = gather_groups(call, how, bands)
        keys = min(2, groups) * call.world / groups * block
        return total + block + keys + 3 * call.world / groups * share
    total += block * (1 + min(2, call.world - 1)) + 3 * share  # published, computed, on its way
    return total + (2 * block + 2 * share) * (kind == "double-ring" and degree > 1)


def _tensors(call: Call) -> float:
    """Bytes of q, out, k and v."""
    return call.rows * (2 * call.q_values + call.kv_values) * call.value_bytes
