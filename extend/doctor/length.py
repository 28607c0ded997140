"""Whether `max_position_embeddings` can be the length that is meant.

No file says so with certainty. A length that another key contradicts outright is asked for; hints
that are weak by themselves count when there are two of them.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from extend.doctor.reading import ModelFiles
from extend.model_config import RopeSpec

_UNIT = 8  # every released length found is a multiple of it; 1234 is not
_THETA_RATIO = 64  # times by which the length that a theta was made for may exceed the config's
_SENTINEL = 10**12  # above it, a tokenizer's model_max_length means "no limit"
# Numbers with a unit in a name, such as 8b, 135m, 128k, 1m and 1M-context.
_NAMED = re.compile(r"(?<![a-z\d.])(\d+(?:\.\d+)?)([bkm])(?![a-z\d])"
                    r"([-_ ]?(?:context|ctx|tokens?)(?![a-z]))?", re.IGNORECASE)
_LARGEST_M = 10  # millions; above it, "m" counts parameters unless the name says context


def length_question(files: ModelFiles, spec: RopeSpec, name_hint: str) -> list[str]:
    """The question for the true length, or an empty list when nothing speaks against the config's.

    Args:
        files: of the checkpoint.
        spec: the RoPE that is meant.
        name_hint: a name that may hold a length, such as `llama-3-8b-1048k`.
    """
    config = files.config
    length = config["max_position_embeddings"]
    product = _product(spec)
    if product is not None and product != length:
        return [f"max_position_embeddings is {length}, but factor {spec.scaling['factor']:g} x "
                f"native length {spec.original_len} is {product}, which some engines take for the "
                f"length: give --max-length {product}, or --max-length {length} with another "
                "factor in the file"]
    larger = {key: config[key] for key in ("seq_length", "max_seq_len", "model_max_length",
                                           "max_sequence_length", "max_seq_length", "seq_len")
              if config.get(key) is not None and config[key] > length}
    if larger:
        listed = ", ".join(f"{key} {value}" for key, value in larger.items())
        return [f"max_position_embeddings is {length}, but another key names more ({listed}): give "
                "--max-length"]
    hints = length_hints(files, spec, name_hint)
    if len(hints) < 2 and not spec.original_len > length:
        return []
    return [f"max_position_embeddings is {length}, which can hardly be meant: "
            + "; ".join(hints) + ". No file says the true length: give --max-length"]


def length_hints(files: ModelFiles, spec: RopeSpec, name_hint: str) -> list[str]:
    """What speaks for another length; each is weak by itself."""
    config = files.config
    length = config["max_position_embeddings"]
    hints = []
    if spec.original_len > length:
        hints.append(f"the native length is {spec.original_len}")
    if length % _UNIT:
        hints.append(f"it is no multiple of {_UNIT}")
    window = config.get("sliding_window")
    if window is not None and window > length and config.get("use_sliding_window") is not False:
        hints.append(f"sliding_window is {window}")
    cap = files.tokenizer_config.get("model_max_length")
    if cap is not None and length < cap < _SENTINEL:
        hints.append(f"the tokenizer's model_max_length is {cap:g}")
    meant = length_of_theta(spec)
    if meant > _THETA_RATIO * length:
        hints.append(f"a theta of {spec.rope_theta:.6g} is one for about {_round(meant)} tokens")
    hints += _hint_of_names(length, name_hint, config.get("_name_or_path"))
    return hints


def length_of_theta(spec: RopeSpec) -> float:
    """The length, within a factor of a few, that a theta is large enough for.

    Source: the power law base = 0.0424 length^1.628 fitted to the lower bounds of Men et al. 2024,
    arXiv:2405.14591.
    """
    return (spec.rope_theta / 0.0424) ** (1 / 1.628)


def _hint_of_names(length: int, *names: Any) -> list[str]:
    for name in names:
        found = _NAMED.findall(str(name or ""))
        for i, (count, unit, context) in enumerate(found):
            others = [other[1].lower() for other in found[:i] + found[i + 1:]]
            if not context and not _counts_tokens(float(count), unit.lower(), others):
                continue
            named = float(count) * {"k": 1e3, "m": 1e6, "b": 1e9}[unit.lower()]
            if named > 1.5 * length:
                return [f"the name {name} says {count}{unit}"]
    return []


def _counts_tokens(count: float, unit: str, others: Sequence[str]) -> bool:
    """Whether a number in a name is one of tokens, not of parameters.

    Args:
        others: units of the other numbers. Models of a few million parameters have no other.
    """
    return unit == "k" or (unit == "m" and count <= _LARGEST_M and bool({"b", "m"} & {*others}))


def _product(spec: RopeSpec) -> int | None:
    if spec.rope_type != "yarn":
        return None
    return round(spec.original_len * spec.scaling["factor"])


def _round(value: float) -> str:
    digits = 10 ** max(int(math.log10(value)), 0)
    return f"{round(value / digits) * digits:,}"
