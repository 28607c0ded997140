"""What a RoPE does to a model, pair by pair, in numbers that need no model.

Everything here compares a RoPE that was made for `target_len` tokens with the native one, under
which the weights were trained on `native.original_len` tokens.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extend.model_config import RopeSpec
from extend.rope import frequencies

if TYPE_CHECKING:
    import torch

NATIVE, TARGET, NEVER = "native", "target", "never"
"""When a pair completes a turn: in the native length, only in the target length, in neither."""
_EULER_GAMMA = 0.5772156649015329
_SERIES_UP_TO = 20.0  # radians; there the series and the asymptotic form are both good to 1e-8
_TABLE = 4096  # positions whose rotations are computed one by one
_JUMPS = 64  # times _TABLE positions are looked at together


@dataclass(frozen=True, slots=True)
class RopeAnalysis:
    """One RoPE against the native one; tensors are fp64 [rotary_dim / 2], fastest pair first.

    Attributes:
        rope, native: the two.
        target_len: tokens, the length that `rope` was made for.
        inv_freq: radians per token of `rope`.
        attention_factor: what it multiplies cos and sin by.
        wavelength: tokens in a turn; infinite for a pair that stands still.
        slowdown: native frequency over new frequency, 1 where nothing changes.
        native_turns: turns in the native length under the native RoPE.
        turns: turns in the target length under `rope`.
        reach: largest angle in the target length over the largest in the native length. A pair that
            never completed a turn natively meets angles it was not trained on where this is above
            1; for the others every angle is known.
        phase_shift: turns by which the pair is off at the end of the native length, which are its
            native turns times the share of its frequency that was taken away.
        movement: how much of the pair a model trained under `native` no longer recognises in its
            own length, from 0 to about 1; see `pair_movement`.
        angle_error: radians, largest error of the fp32 angles near the target length.
        horizon: see `base_horizon`; None when it lies beyond `horizon_limit`.
        horizon_limit: tokens that were searched.
    """

    rope: RopeSpec
    native: RopeSpec
    target_len: int
    inv_freq: "torch.Tensor"
    attention_factor: float
    wavelength: "torch.Tensor"
    slowdown: "torch.Tensor"
    native_turns: "torch.Tensor"
    turns: "torch.Tensor"
    reach: "torch.Tensor"
    phase_shift: "torch.Tensor"
    movement: "torch.Tensor"
    angle_error: "torch.Tensor"
    horizon: int | None
    horizon_limit: int

    @property
    def states(self) -> list[str]:
        """`NATIVE`, `TARGET` or `NEVER` for each pair."""
        return [NATIVE if native >= 1 else TARGET if target >= 1 else NEVER
                for native, target in zip(self.native_turns.tolist(), self.turns.tolist())]

    @property
    def full_pairs(self) -> int:
        """Pairs that complete a turn within the target length."""
        return int((self.turns >= 1).sum())

    @property
    def unseen_pairs(self) -> int:
        """Pairs that meet angles in the target length which they never had in the native one."""
        return int(((self.native_turns < 1) & (self.reach > 1 + 1e-9)).sum())

    @property
    def mean_movement(self) -> float:
        """`movement` over all pairs; see `pair_movement` for what it foretells of a merge."""
        return float(self.movement.mean())


def analyse(rope: RopeSpec, native: RopeSpec, target_len: int) -> RopeAnalysis:
    """Compare `rope`, made for `target_len` tokens, with the plain RoPE `native`.

    Raises:
        CompatibilityError: a rope_type whose frequencies are not known.
    """
    before, after = frequencies.inv_freq(native), frequencies.inv_freq(rope)
    turn, native_len = 2 * math.pi, native.original_len
    at_native = frequencies.inv_freq(rope, native_len)  # longrope may have a list for short rows
    slowdown = (before / after).where(after != before, 1.0)  # two pairs that stand still: 0 / 0
    limit = max(2 * target_len, 2 ** 21)
    return RopeAnalysis(
        rope=rope, native=native, target_len=target_len, inv_freq=after,
        attention_factor=frequencies.attention_factor(rope), wavelength=turn / after,
        slowdown=slowdown, native_turns=native_len * before / turn,
        turns=target_len * after / turn, reach=target_len / native_len / slowdown,
        phase_shift=native_len * (before - at_native) / turn,
        movement=pair_movement(before, at_native, native_len),
        angle_error=angle_error(rope, target_len),
        horizon=base_horizon(after, limit), horizon_limit=limit)


def pair_movement(before: "torch.Tensor", after: "torch.Tensor",
                  native_len: int) -> "torch.Tensor":
    """How much of each pair a model no longer recognises within its own length.

    A query and a key at distance m meet in a pair turned by the angle m f. Under another frequency
    f' the model, or a fine-tune of it, sees an angle that is off by m (f - f'), and
    1 - cos(m (f - f')) of the pair's contribution is not what its weights were trained for. The
    movement is the mean of that over distances from 1 to `native_len`, with equal weight for equal
    ratios of distances, because attention falls off with distance about as a power law does:

        1 / ln L * integral from 1 to L of (1 - cos(m |f - f'|)) / m dm

    So 0 is a pair that stays, and 1 one whose angle bears no relation to the old one from the first
    tokens on. A pair's turns in the native length are in it, since its angle there goes wrong by
    its turns times the share taken from its frequency: to slow a pair by 16 costs next to nothing
    when it makes 0.01 turns, and nearly everything when it makes 1000.

    It is a diagnostic: it knows nothing of which pairs and distances a model really uses. In trials
    without training (docs/results/merge-safety, by scripts/merge_safety.py) the rank correlation of
    its mean over pairs with the skill that siblings lost was 0.89 on a model of 0.87 M parameters
    and 0.70 on SmolLM2-135M. For a skill that reads thousands of tokens back it was 0.37: that one
    rests on slow pairs, which hardly count here. And 0.33 did no harm to the second model while
    0.22 took most from the first, so compare rescalings of one model only.

    Args:
        before, after: radians per token, fp64 [pairs].
        native_len: tokens, L.

    Returns:
        fp64 [pairs].
    """
    shift = (before - after).abs()
    return (_cin(native_len * shift) - _cin(shift)) / math.log(max(native_len, 2))


def _cin(x: "torch.Tensor") -> "torch.Tensor":
    """The integral of (1 - cos t) / t from 0 to x, for fp64 x >= 0, to 1e-8.

    Source: Abramowitz and Stegun 1964, 5.2.16 (series) and 5.2.34, 5.2.35 (asymptotic form).
    """
    import torch

    small, large = x.clamp(max=_SERIES_UP_TO), x.clamp(min=_SERIES_UP_TO)
    term, series = torch.ones_like(x), torch.zeros_like(x)
    for k in range(2, 80, 2):
        term = -term * small * small / (k * (k - 1))
        series -= term / k
    even, odd = torch.zeros_like(x), torch.zeros_like(x)
    for k in reversed(range(1, 20, 2)):  # nested: 1 - 2!/x^2 + 4!/x^4 ... and 1 - 3!/x^2 ...
        even = 1 - even * k * (k + 1) / large ** 2
        odd = 1 - odd * (k + 1) * (k + 2) / large ** 2
    ci = torch.sin(large) / large * even - torch.cos(large) / large ** 2 * odd
    return torch.where(x <= _SERIES_UP_TO, series, _EULER_GAMMA + large.log() - ci)


def base_horizon(inv_freq: "torch.Tensor", limit: int) -> int | None:
    """The smallest distance m in [1, limit) with sum_i cos(m f_i) < 0, or None.

    A query then prefers, averaged over contents, a random token to one like itself at distance m.
    A diagnostic and no gate: good long models exist far beyond theirs (Llama-2 has 4096 tokens and
    a horizon of 1707), and it does not grow steadily with theta.

    Args:
        inv_freq: radians per token, fp64 [pairs].
        limit: tokens.

    Source: Xu et al. 2024, arXiv:2405.14591, theorem 1.
    """
    import torch

    # m = start + offset, and cos of a sum of angles is a product of matrices.
    offsets = torch.arange(_TABLE, dtype=torch.float64)[:, None] * inv_freq
    table = torch.cat([offsets.cos(), -offsets.sin()], dim=1)
    for begin in range(0, limit, _TABLE * _JUMPS):
        starts = (begin + _TABLE * torch.arange(_JUMPS, dtype=torch.float64))[:, None] * inv_freq
        sums = (torch.cat([starts.cos(), starts.sin()], dim=1) @ table.T).flatten()
        negative = (sums < 0).nonzero()
        if len(negative):
            found = begin + int(negative[0])
            return found if found < limit else None
    return None


def angle_error(spec: RopeSpec, length: int) -> "torch.Tensor":
    """Largest error of each pair's fp32 angle over the last positions below `length`.

    transformers computes frequencies, and positions times frequencies, in fp32. The error grows
    with the position, and only fast pairs, whose angles are large, have much of it. Inference in
    fp32 makes the same error as training in fp32, so what counts is that both compute alike;
    positions in bf16 would be far worse.

    Returns:
        radians, fp64 [rotary_dim / 2].

    Source: transformers, modeling_rope_utils.py and LlamaRotaryEmbedding.forward.
    """
    import torch

    positions = torch.arange(max(0, length - _TABLE), length)[:, None]
    exact = positions.double() * frequencies.inv_freq(spec)
    return (positions.float() * _single_inv_freq(spec) - exact).abs().amax(dim=0)


def _single_inv_freq(spec: RopeSpec) -> "torch.Tensor":
    """The fp32 frequencies as transformers gets them: plain ones in fp32, then scaled."""
    import torch

    exponent = torch.arange(0, spec.rotary_dim, 2).float() / spec.rotary_dim
    single = 1.0 / spec.rope_theta ** exponent
    plain = RopeSpec(rope_theta=spec.rope_theta, rotary_dim=spec.rotary_dim,
                     original_len=spec.original_len)
    return single / (frequencies.inv_freq(plain) / frequencies.inv_freq(spec)).float()
