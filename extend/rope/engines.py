"""What engines are known to make of a written RoPE, where no key makes them do otherwise.

For the one warning of a rescaling. `extend doctor` compares the engines in full, by reading the
files as each does; a test keeps the two of one mind.
"""

import math
from collections.abc import Callable

from extend.model_config import RopeSpec, longrope_mscale, yarn_mscale
from extend.model_config.families import LLAMA_CPP, THREE_ENTRIES
from extend.rope.frequencies import attention_factor

_MULTIPLIED_NOWHERE = "gemma3_text"  # linear is how its context was made, and engines know


def differing_engines(family: str, rope: RopeSpec) -> list[str]:
    """A clause for each engine that computes otherwise than transformers 5, with what it does.

    Args:
        family: `model_type`. Of one that was not looked up, nothing is said about llama.cpp's
            converter.
        rope: as it is written.
    """
    check = _BY_TYPE.get(rope.rope_type)
    return [] if check is None else check(family, rope)


def _linear(family: str, rope: RopeSpec) -> list[str]:
    if family == _MULTIPLIED_NOWHERE:
        return []
    factor = f"{rope.scaling['factor']:g}"
    return [f"vLLM and SGLang take {factor} times max_position_embeddings for the maximum length "
            "(give --max-model-len or --context-length)"]


def _not_in_llama_cpp(family: str, rope: RopeSpec) -> list[str]:
    if family not in LLAMA_CPP or rope.rope_type in LLAMA_CPP[family]:
        return []
    return [f"llama.cpp's converter drops rope_type {rope.rope_type} for model_type {family!r}, "
            "and the GGUF computes plain RoPE"]


def _longrope(family: str, rope: RopeSpec) -> list[str]:
    found = _not_in_llama_cpp(family, rope)
    usual = longrope_mscale(rope.scaling["factor"], rope.original_len)
    unusual = not math.isclose(attention_factor(rope), usual, rel_tol=1e-9)
    if rope.depends_on_length:
        found.append("vLLM reads every text with short_factor and stops at the native length, "
                     "unless told --max-model-len")
        if rope.rope_type in LLAMA_CPP.get(family, ()):
            found.append("llama.cpp reads every text with the list of its context's length")
    if unusual and family in THREE_ENTRIES:
        found += [f"transformers 4 does not load model_type {family!r} with an attention factor",
                  f"llama.cpp multiplies cos and sin by {usual:.6g}"]
    return found


def _proportional(family: str, rope: RopeSpec) -> list[str]:
    return ["transformers 4 and SGLang do not load it", *_not_in_llama_cpp(family, rope)]


def _yarn(family: str, rope: RopeSpec) -> list[str]:
    found, usual = [], yarn_mscale(rope.scaling["factor"])
    if rope.scaling.get("truncate") is False:
        found.append("llama.cpp rounds the ends of YaRN's ramp to whole pairs")
    if not math.isclose(attention_factor(rope), usual, rel_tol=1e-9):
        engines = "llama.cpp" if "attn_factor" in rope.scaling else "SGLang and llama.cpp"
        verb = "multiplies" if engines == "llama.cpp" else "multiply"
        found.append(f"{engines} {verb} cos and sin by {usual:.6g} instead of "
                     f"{attention_factor(rope):.6g}")
    return found


_BY_TYPE: dict[str, Callable[[str, RopeSpec], list[str]]] = {
    "linear": _linear,
    "llama3": _not_in_llama_cpp,
    "longrope": _longrope,
    "proportional": _proportional,
    "yarn": _yarn,
}
