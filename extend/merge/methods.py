"""How a delta is fitted to a target before it is added: as it is, or by what the target changed.

The drift of a target is target - base: what its own fine-tuning did. A delta of another model that
collides with it costs the target its skill; the methods here give way where the target moved.

Importing this imports no torch, so that recipes can be checked without it.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from extend.errors import RecipeError
from extend.registry import check_options, lookup

if TYPE_CHECKING:
    import torch

    Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]

_STEEPNESS = 12.0


class Method:
    """The delta as it is.

    Attributes:
        needs_base: whether `adjust` must be given the base's values.
        by_rows: whether `adjust` may be given blocks of rows, once `measure` has seen the whole.
    """

    needs_base = False
    by_rows = True

    def measure(self, name: str, pairs: "Pairs") -> None:
        """Look at a parameter before it is adjusted in blocks.

        Args:
            pairs: (target, base) of every block of rows, fp32.
        """

    def adjust(self, name: str, delta: "torch.Tensor", target: "torch.Tensor",
               base: "torch.Tensor | None") -> "torch.Tensor":
        """The delta to add to the target, to be scaled by the merge's weights.

        Args:
            name: of the parameter.
            delta: fp32, may be overwritten.
            target: fp32, same shape.
            base: the same for the model that the target was tuned from; None unless `needs_base`.
        """
        return delta


class DriftAware(Method):
    """Less of the delta for each element that the target's own tuning moved.

    With d = |target - base| / max |target - base| over the parameter, an element gets
    1 - sigmoid(12 d - 6) of its delta, stretched so that d = 0 gives all of it and d = 1 nothing.

    Source: the ratio of EasyLLMFeaturePorter (StableFluffy), which gives 0.9975 and 0.0025 at the
    two ends; there an untouched target does not get the whole delta.
    """

    needs_base = True

    def __init__(self) -> None:
        self._largest: dict[str, float] = {}

    def measure(self, name: str, pairs: "Pairs") -> None:
        self._largest[name] = max((float((t - b).abs().max()) for t, b in pairs if t.numel()),
                                  default=0.0)

    def adjust(self, name: str, delta: "torch.Tensor", target: "torch.Tensor",
               base: "torch.Tensor | None") -> "torch.Tensor":
        import torch

        drift = (target - base).abs_()
        largest = self._largest.get(name)
        if largest is None:
            largest = float(drift.max()) if drift.numel() else 0.0
        if largest == 0:
            return delta
        half = _STEEPNESS / 2
        # 1 - sigmoid(x) is (1 - tanh(x / 2)) / 2; tanh(half / 2) is what it reaches at the ends.
        kept = torch.tanh(drift.div_(largest).mul_(half).sub_(half / 2))
        return delta.mul_(kept.div_(torch.tanh(torch.tensor(half / 2))).neg_().add_(1).div_(2))


class Orthogonal(Method):
    """The delta without its part in the leading singular subspace of the target's own drift.

    With target - base = U S V^T cut to its leading values, a 2-D delta D becomes
    (I - U U^T) D for `left`, D (I - V V^T) for `right`, and both for `both`. Parameters of other
    dimensions are added as they are.

    Args:
        rank: leading values of each matrix.
        energy: in (0, 1]; in place of `rank`, the fewest values that hold this share of the
            squared norm.
        side: left protects what the target's tuning writes, right what it reads.
    """

    needs_base = True
    by_rows = False

    def __init__(self, *, rank: int | None = None, energy: float | None = None,
                 side: Literal["both", "left", "right"] = "both"):
        if (rank is None) == (energy is None):
            raise RecipeError(f"orthogonal: rank is {rank} and energy is {energy}; give one of the "
                              "two")
        if rank is not None and not (isinstance(rank, int | float) and 1 <= rank == int(rank)):
            raise RecipeError(f"orthogonal: rank is {rank!r}; give an integer of at least 1")
        if energy is not None and not 0 < energy <= 1:
            raise RecipeError(f"orthogonal: energy is {energy!r}; give a number in (0, 1]")
        if side not in ("both", "left", "right"):
            raise RecipeError(f"orthogonal: side is {side!r}; choose one of both, left, right")
        self.rank = None if rank is None else int(rank)
        self.energy, self.side = energy, side

    def adjust(self, name: str, delta: "torch.Tensor", target: "torch.Tensor",
               base: "torch.Tensor | None") -> "torch.Tensor":
        import torch

        if delta.dim() != 2:
            return delta
        drift = target - base
        if not bool(drift.any()):
            return delta
        u, values, vt = torch.linalg.svd(drift, full_matrices=False)
        kept = self._count(values)
        u, vt = u[:, :kept], vt[:kept]
        if self.side != "right":
            delta = delta - u @ (u.T @ delta)
        if self.side != "left":
            delta = delta - (delta @ vt.T) @ vt
        return delta

    def _count(self, values: "torch.Tensor") -> int:
        if self.rank is not None:
            return min(self.rank, int((values > 0).sum()))
        squares = values.double().square().cumsum(0)
        return int((squares < self.energy * squares[-1]).sum()) + 1


METHODS: dict[str, type[Method]] = {
    "add": Method, "drift-aware": DriftAware, "orthogonal": Orthogonal}


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """One of `METHODS` with its options.

    Raises:
        RecipeError: no such method, or an option that it does not take.
    """
    found = lookup(METHODS, name, "method")
    check_options(found.__init__, options, f"method {name}")
    return found(**options)
