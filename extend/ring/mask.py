"""Which keys a query may see, and how that looks inside one block.

Positions are those of the whole sequence; a row is an index into a tensor on one rank. A `Mask`
says in positions what attention computes; a `TileMask` says it in rows of one tile, which is all
that a kernel needs to know.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from extend.errors import CompatibilityError


@dataclass(frozen=True)
class Mask:
    """What a query at position p may see of a sequence; hashable, equal on every rank.

    Attributes:
        causal: keys at its own and earlier positions only; otherwise all.
        window: of those, its own and the `window - 1` before it; needs `causal`. None: no limit.
        cu_seqlens: (0, ..., seq_len), where documents begin; only keys of its own document. None:
            one document.
    """

    causal: bool = True
    window: int | None = None
    cu_seqlens: tuple[int, ...] | None = None


class TileMask(NamedTuple):
    """Query row i of a tile sees its key row j only if lo <= i - j <= hi (None: no bound).

    With `cu_seqlens`, (0, ..., n), the tile is square, n rows by n rows, and holds documents side
    by side: i and j must be of the same one, and the bounds hold as well.
    """

    lo: int | None = None
    hi: int | None = None
    cu_seqlens: tuple[int, ...] | None = None


FULL = TileMask()
CAUSAL = TileMask(lo=0)
ANTICAUSAL = TileMask(hi=0)  # CAUSAL with its rows and keys counted backwards


def make_mask(
    causal: bool, window: int | None, cu_seqlens: Tensor | Sequence[int] | None, seq_len: int
) -> Mask:
    """The mask of a sequence of `seq_len` tokens, without what makes no difference.

    Raises:
        CompatibilityError: a window without causality or under one token, boundaries that do not
            rise from 0 to `seq_len`, or numbers that are not whole.
    """
    window = _check_window(window, causal)
    bounds = _check_boundaries(cu_seqlens, seq_len)
    longest = max(b - a for a, b in pairwise(bounds or (0, seq_len)))
    if window is not None and window >= longest:
        window = None
    return Mask(causal, window, bounds)


def _check_window(window: int | None, causal: bool) -> int | None:
    if window is None:
        return None
    try:
        tokens = operator.index(window)
    except TypeError:
        tokens = 0
    if tokens < 1 or not causal:
        raise CompatibilityError(
            f"ring_attention: window={window} with causal={causal}; a window is a whole number of "
            "tokens, at least 1, and looks back from a query (causal=True)"
        )
    return tokens


def _check_boundaries(
    cu_seqlens: Tensor | Sequence[int] | None, seq_len: int
) -> tuple[int, ...] | None:
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            raise CompatibilityError(
                f"ring_attention: cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype "
                f"{cu_seqlens.dtype}; pass whole numbers in one dimension, from 0 to {seq_len}"
            )
        cu_seqlens = cu_seqlens.tolist()
    try:
        bounds = tuple(map(operator.index, cu_seqlens))
    except TypeError as error:
        raise CompatibilityError(
            f"ring_attention: cu_seqlens {str(cu_seqlens)[:80]} is no row of whole numbers "
            f"({error}); pass document boundaries from 0 to {seq_len}"
        ) from error
    rising = all(a < b for a, b in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != seq_len or not rising:
        shown = ", ".join(map(str, bounds[:4])) + (", ..." if len(bounds) > 4 else "")
        raise CompatibilityError(
            f"ring_attention: cu_seqlens ({shown}), {len(bounds)} boundaries ending at "
            f"{bounds[-1] if bounds else 'nothing'}, for a sequence of {seq_len} tokens; pass "
            "strictly rising document boundaries of the whole sequence, from 0 to its length"
        )
    return None if len(bounds) == 2 else bounds
