"""How many ranks each module of an adapter gets: four rules, of which a caller chooses one.

    noise     what stands out of the rounding of the stored weights; when nothing is chosen
    fixed     the same rank everywhere
    energy    a share of each matrix's squared norm
    bytes     a size of the adapter file, spent where the singular values are largest

The noise rule has limits. Where the tuned model is stored in 32 bits, rounding hides nothing:
nearly every singular value of a full fine-tune is above the edge, and an adapter of all of them is
larger than the delta. Such a model gets `LIMIT_32_BITS`; whoever wants more of it names a rank, an
energy or a size. A model in 16 bits that moved far in every direction is close to that too, so its
factors take at most half the elements of the matrix, and the rank ends at `LIMIT_16_BITS`, the
largest that a serving engine accepts.

Source: for one threshold over all layers, PARA (arXiv 2604.27796). For `LIMIT_16_BITS`, the values
of `max_lora_rank` in vllm/config/lora.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from extend.delta.noise import Noise
from extend.delta.svd import (
    Factors,
    factorize_to_edge,
    factorize_to_energy,
    factorize_to_rank,
    tensor_generator,
)
from extend.errors import RecipeError

LIMIT_32_BITS = 32
LIMIT_16_BITS = 512
FLOATS_OF_32_BITS = ("F32", "F64")  # differences are taken in fp32


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRule:
    """One of `rank`, `energy` and `adapter_bytes`, or none of them for the noise rule.

    Attributes:
        exact: decompose Gram matrices instead of sketches.
        seed: of the sketches.

    Raises:
        RecipeError: two of them, or one out of range.
    """

    rank: int | None = None
    energy: float | None = None
    adapter_bytes: int | None = None
    exact: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        given = {key: value for key in ("rank", "energy", "adapter_bytes")
                 if (value := getattr(self, key)) is not None}
        if len(given) > 1:
            listed = " and ".join(f"{key} is {value}" for key, value in given.items())
            raise RecipeError(f"{listed}; give one of them")
        for key in given.keys() & {"rank", "adapter_bytes"}:
            if isinstance(given[key], bool) or not isinstance(given[key], int) or given[key] < 1:
                raise RecipeError(f"{key} is {given[key]!r}; give a whole number of at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RecipeError(f"energy is {self.energy!r}; give a fraction in (0, 1], such as 0.95")

    @property
    def name(self) -> str:
        if self.rank is not None:
            return "fixed"
        if self.energy is not None:
            return "energy"
        return "noise" if self.adapter_bytes is None else "bytes"

    def factorize(self, name: str, delta: torch.Tensor, noise: Noise, dtype: str,
                  at_rank: int) -> Factors:
        """Decompose the delta of one parameter as far as the rule asks.

        Args:
            name: of the parameter.
            delta: [out, in], fp32, not zero.
            noise: of that delta.
            dtype: safetensors name of the dtype that the tuned parameter is stored in.
            at_rank: how far a byte budget asks to look; the other rules know for themselves.
        """
        generator = tensor_generator(name, self.seed)
        if self.energy is not None:
            return factorize_to_energy(delta, self.energy, generator, exact=self.exact)
        if self.name == "noise":
            return factorize_to_edge(delta, noise.edge, noise_limit(dtype, *delta.shape),
                                     generator, exact=self.exact)
        rank = at_rank if self.rank is None else self.rank
        return factorize_to_rank(delta, rank, generator, exact=self.exact)


def noise_limit(dtype: str, rows: int, columns: int) -> int:
    """The largest rank that the noise rule gives to a matrix stored in `dtype`."""
    if dtype in FLOATS_OF_32_BITS:
        return LIMIT_32_BITS
    half = rows * columns // (2 * (rows + columns))
    return max(LIMIT_32_BITS, min(LIMIT_16_BITS, half))


def even_rank(shapes: Iterable[tuple[int, int]], num_bytes: int, element_bytes: int) -> int:
    """The rank, at least 1, that a budget affords when every matrix gets the same."""
    return max(1, num_bytes // (element_bytes * sum(rows + columns for rows, columns in shapes)))


def ranks_within(values: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]],
                 num_bytes: int, element_bytes: int) -> dict[str, int]:
    """Cut the singular values of all modules at one height, so that the factors fit a budget.

    Every module keeps rank 1 at least, because PEFT has no rank 0.

    Args:
        values: module -> singular values, falling; at least one each.
        shapes: module -> (out, in).
        num_bytes: for the factors of all modules together.
        element_bytes: of the dtype that they are stored in.

    Raises:
        RecipeError: rank 1 everywhere takes more.
    """
    names = sorted(values)
    cost = torch.tensor([element_bytes * sum(shapes[name]) for name in names])
    if int(cost.sum()) > num_bytes:
        raise RecipeError(f"adapter_bytes leaves {num_bytes:,} bytes for the factors, but rank 1 "
                          f"of {len(names)} modules takes {int(cost.sum()):,}; give at least "
                          f"{int(cost.sum()) - num_bytes:,} bytes more")
    heights = [values[name].detach().cpu().double().clone() for name in names]
    for height in heights:
        height[0] = float("inf")
    owner = torch.repeat_interleave(torch.arange(len(names)),
                                    torch.tensor([len(height) for height in heights]))
    order = torch.cat(heights).argsort(descending=True, stable=True)
    kept = owner[order[cost[owner[order]].cumsum(0) <= num_bytes]]
    return dict(zip(names, torch.bincount(kept, minlength=len(names)).tolist(), strict=True))
