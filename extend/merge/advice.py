"""What trials say against a merge that is possible all the same."""

from collections.abc import Sequence

from extend.adapter_format.sidecar import RopeChange
from extend.errors import ExtendError
from extend.model_config import RopeSpec

FAST_TURNS = 32  # within the native length
_MOVED = 1.05  # native frequency over new frequency


def moves_fast_pairs(change: RopeChange) -> bool:
    """Whether a RoPE change slows pairs that turn more than `FAST_TURNS` times natively.

    Theta methods and NTK do; ramps (by-parts, YaRN) and llama3 do not.
    """
    from extend.rope.frequencies import inv_freq, turns

    before, after = RopeSpec.from_json(change.before), RopeSpec.from_json(change.after)
    try:
        slowdown = inv_freq(before) / inv_freq(after)
        fast = turns(before) > FAST_TURNS
    except ExtendError:  # a RoPE whose frequencies are not known here
        return False
    return bool((slowdown[fast] > _MOVED).any())


def advise(change: RopeChange | None, method: str, weights: Sequence[float]) -> list[str]:
    """Lines to warn with; none where nothing is known against the merge.

    Source: docs/results/transfer: where the RoPE moves fast pairs, it takes skills of the target
    and the whole delta gives most of them back.
    """
    if change is None or not moves_fast_pairs(change):
        return []
    takes = (f"the long RoPE moves pairs that turn more than {FAST_TURNS} times in the native "
             "length, which takes skills of a target that the whole delta mostly gives back")
    lines = []
    if method == "orthogonal":
        lines.append(f"{takes}; orthogonal leaves out just that part: merge with method add, or "
                     "repair afterwards, and score the target's own task")
    if any(0 < weight < 1 for weight in weights):
        lines.append(f"{takes}; a weight below 1 gives back less: score the target's own task")
    return lines
