"""The RoPE of a GGUF model, as a config says it.

Source: llama.cpp, src/llama-model.cpp (`rope.scaling.*`, `rope_freqs`) and convert_hf_to_gguf.py.
"""

import math
from typing import Any

import numpy as np

from extend.errors import CompatibilityError
from extend.gguf.header import Header

FACTORS = "rope_freqs.weight"
_NATIVE_LLAMA3 = 8192  # of every model that Meta extended so
_LOW, _HIGH = 1.0, 4.0
_LLAMA3_TOLERANCE = 1e-5  # relative: the file holds fp32 that was computed in fp32


def rope_parameters(header: Header, head_dim: int) -> dict[str, Any]:
    """The `rope_parameters` of the layers with full attention.

    Raises:
        CompatibilityError: a scaling that a config cannot say.
    """
    theta = shortest(header.of_model("rope.freq_base", 10000.0))
    kind = header.of_model("rope.scaling.type", "none")
    if FACTORS in header.tensors:
        if kind not in ("none", "linear") or header.of_model("rope.scaling.factor", 1.0) != 1.0:
            raise CompatibilityError(f"{header.path}: has both {FACTORS} and rope.scaling.type "
                                     f"{kind!r}; such a RoPE is not supported")
        return {"rope_theta": theta, **_llama3(header, head_dim, theta)}
    if kind not in SCALINGS:
        raise CompatibilityError(f"{header.path}: rope.scaling.type is {kind!r}; supported are "
                                 f"{', '.join(SCALINGS)}")
    if kind != "yarn" and header.of_model("rope.scaling.attn_factor", 1.0) != 1.0:
        raise CompatibilityError(f"{header.path}: rope.scaling.attn_factor is for yarn, but "
                                 f"rope.scaling.type is {kind!r}; import the model from its "
                                 "original checkpoint")
    return {"rope_theta": theta, **SCALINGS[kind](header)}


def shortest(value: float) -> float:
    """A number that was stored as fp32 as it was written before: 1e-05, not 9.99999975e-06."""
    return float(str(np.float32(value)))


def _none(header: Header) -> dict[str, Any]:
    return {"rope_type": "default"}


def _linear(header: Header) -> dict[str, Any]:
    factor = shortest(header.of_model("rope.scaling.factor", 1.0))
    return _none(header) if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _yarn(header: Header) -> dict[str, Any]:
    """The converter copies what the config says; llama.cpp itself reads no attention factor."""
    found: dict[str, Any] = {
        "rope_type": "yarn", "factor": shortest(header.need_of_model("rope.scaling.factor")),
        "original_max_position_embeddings":
            int(header.need_of_model("rope.scaling.original_context_length"))}
    for key, name in YARN_KEYS.items():
        if header.of_model(key) is not None:
            found[name] = shortest(header.of_model(key))
    return found


def _llama3(header: Header, head_dim: int, theta: float) -> dict[str, Any]:
    """Llama 3.1's scaling, of which a GGUF file keeps the factors of the wavelengths alone."""
    from gguf import dequantize

    tensor = header.tensors[FACTORS]
    stored = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float64).ravel()
    factor = float(stored.max())
    for native in _natives(header, factor):
        expected = _llama3_factors(head_dim, theta, factor, native)
        if stored.shape == expected.shape and np.all(
                np.abs(stored / expected - 1) < _LLAMA3_TOLERANCE):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": _LOW,
                    "high_freq_factor": _HIGH, "original_max_position_embeddings": native}
    raise CompatibilityError(
        f"{header.path}: {FACTORS} holds factors up to {factor:g} that are not those of Llama "
        f"3.1's scaling from {_NATIVE_LLAMA3} tokens or another native length; import the model "
        "from its original checkpoint")


def _natives(header: Header, factor: float) -> list[int]:
    """Native lengths to try: the file says none, but it decides the factors between the ends."""
    told = header.of_model("rope.scaling.original_context_length")
    whole = round(int(header.need_of_model("context_length")) / factor)
    return [int(told)] if told else [_NATIVE_LLAMA3, whole, *(2**n for n in range(9, 19))]


def _llama3_factors(head_dim: int, theta: float, factor: float, native: int) -> np.ndarray:
    """Old frequency / new one, for each pair of channels."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((native / wavelength - _LOW) / (_HIGH - _LOW), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


YARN_KEYS = {"rope.scaling.attn_factor": "attention_factor",
             "rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
SCALINGS = {"none": _none, "linear": _linear, "yarn": _yarn}
