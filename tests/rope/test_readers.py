"""One written config, many readers: each finds the same frequencies and the same length.

The readers are written out here from what each program does with config.json; the frequencies are
computed by transformers' own functions where it has them and in closed form elsewhere.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from extend.model_config import RopeSpec, read_config, write_rope
from extend.rope import METHODS, rescale
from extend.rope.frequencies import attention_factor, inv_freq
from tests.rope.conftest import NATIVE
from tests.rope.test_methods import LLAMA2, LLAMA3, REQUIRED, SMALL, call

TARGET = 16 * NATIVE
# Readers multiply max_position_embeddings by the factor of rope_type linear, and of no other type.
NOT_LINEAR = [m for m in METHODS if m != "linear"]


@pytest.fixture(params=METHODS)
def written(request, llama, tmp_path) -> tuple[str, Path, RopeSpec]:
    method = request.param
    out = rescale(llama, tmp_path / "out", target_len=TARGET, method=method,
                  **REQUIRED.get(method, {}))
    return method, out, read_config(out).rope


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


# --- frequencies ---

def closed_form(theta: float, dim: int, scaling: dict, original: int) -> np.ndarray:
    """inv_freq [dim / 2], pair by pair, from the definitions of the four rope types."""
    found = []
    for i in range(dim // 2):
        plain = theta ** (-2 * i / dim)
        factor = scaling.get("factor", 1.0)
        kind = scaling.get("rope_type", "default")
        if kind == "default":
            kept = 1.0
        elif kind == "linear":
            kept = 0.0
        elif kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = (original * plain / (2 * math.pi) - low) / (high - low)
        else:
            first, last = (dim * math.log(original / (count * 2 * math.pi)) / (2 * math.log(theta))
                           for count in (32, 1))
            first, last = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
            kept = 1 - (i - first) / (last - first)
        kept = min(max(kept, 0.0), 1.0)
        found.append(kept * plain + (1 - kept) * plain / factor)
    return np.array(found)


def transformers_4(config: dict) -> tuple[float, dict, int]:
    """Knows nothing of rope_parameters; the native length is inside rope_scaling."""
    scaling = dict(config.get("rope_scaling") or {})
    if scaling:
        scaling["rope_type"] = scaling.get("rope_type", scaling.get("type"))
    original = scaling.get("original_max_position_embeddings", config["max_position_embeddings"])
    return config.get("rope_theta", 10000.0), scaling, original


def transformers_5(config: dict) -> tuple[float, dict, int]:
    scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    scaling.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    scaling.setdefault("rope_type", scaling.get("type", "default"))
    original = config.get("original_max_position_embeddings") or scaling.get(
        "original_max_position_embeddings", config["max_position_embeddings"])
    return scaling["rope_theta"], scaling, original


def only_rope_parameters(config: dict) -> tuple[float, dict, int]:
    """A reader of the newest spelling alone."""
    inner = config["rope_parameters"]
    return inner["rope_theta"], inner, inner.get("original_max_position_embeddings",
                                                 config["max_position_embeddings"])


def llama_cpp(config: dict) -> tuple[float, dict, int]:
    """The native length at the top level only, 8192 when it is not there."""
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    return config["rope_theta"], scaling, config.get("original_max_position_embeddings", 8192)


@pytest.mark.parametrize("reader", [transformers_4, transformers_5, only_rope_parameters,
                                    llama_cpp])
def test_every_reader_finds_the_same_frequencies(reader, written):
    _, out, spec = written
    theta, scaling, original = reader(config_of(out))
    np.testing.assert_allclose(inv_freq(spec).numpy(),
                               closed_form(theta, spec.rotary_dim, scaling, original),
                               rtol=1e-13)  # fp64, two orders of the same operations


@pytest.mark.parametrize("base", [LLAMA3, LLAMA2, SMALL], ids=lambda s: str(s.rope_theta))
@pytest.mark.parametrize("method", METHODS)
def test_transformers_computes_the_same(method, base):
    target = 16 * base.original_len
    spec = call(method, base, target)
    raw = {"model_type": "llama", "hidden_size": base.rotary_dim * 4, "num_attention_heads": 4,
           "head_dim": base.rotary_dim, "rope_theta": base.rope_theta,
           "max_position_embeddings": base.original_len}
    config = LlamaConfig.from_dict(write_rope(raw, spec, target))
    if spec.rope_type == "default":
        module = LlamaRotaryEmbedding(config)
        found, scaling = module.inv_freq, module.attention_scaling
    else:
        found, scaling = ROPE_INIT_FUNCTIONS[spec.rope_type](config, "cpu")
    # fp32 powers: exponent and logarithm each round once, times ln(theta) of about 20.
    torch.testing.assert_close(found.double(), inv_freq(spec), rtol=5e-6, atol=0)
    assert scaling == pytest.approx(attention_factor(spec), rel=1e-14)


@pytest.mark.parametrize("options", [
    {"beta_fast": 4.0}, {"beta_slow": 0.5, "beta_fast": 8.0}, {"attention_factor": 1.5},
    {"truncate": False}])
def test_transformers_computes_the_same_with_yarn_options(options):
    spec = call("yarn", LLAMA3, 131072, **options)
    raw = {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 4,
           "max_position_embeddings": 8192}
    config = LlamaConfig.from_dict(write_rope(raw, spec, 131072))
    found, scaling = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    torch.testing.assert_close(found.double(), inv_freq(spec), rtol=5e-6, atol=0)
    assert scaling == pytest.approx(attention_factor(spec), rel=1e-14)


# --- lengths ---

LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length",
               "model_max_length", "max_target_positions", "max_sequence_length",
               "max_seq_length", "seq_len")


def vllm_length(directory: Path) -> int:
    """Smallest of all lengths, the tokenizer's included, times the factor of some types."""
    config = config_of(directory)
    lengths = [config[key] for key in LENGTH_KEYS if config.get(key) is not None]
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    found = min(*lengths, tokenizer["model_max_length"])
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":  # as versions did before they took the length as it is
        return int(rope["original_max_position_embeddings"] * rope["factor"])
    if rope["rope_type"] in ("default", "su", "longrope", "llama3"):
        return found
    return int(found * rope["factor"])


def sglang_length(directory: Path) -> int:
    """First of several lengths, times the factor unless the native length or llama3 is named."""
    config = config_of(directory)
    found = next(config[key] for key in ("max_sequence_length", "seq_length", "max_seq_len",
                                         "model_max_length", "max_position_embeddings")
                 if config.get(key) is not None)
    rope = config.get("rope_scaling") or {}
    if not rope or "original_max_position_embeddings" in rope or rope["rope_type"] == "llama3":
        return found
    return int(found * rope.get("factor", 1))


def plain_length(directory: Path) -> int:
    return config_of(directory)["max_position_embeddings"]


@pytest.mark.parametrize("reader", [vllm_length, sglang_length, plain_length])
@pytest.mark.parametrize("method", NOT_LINEAR)
def test_every_reader_finds_the_same_length(reader, method, damaged, tmp_path):
    path = damaged / "config.json"
    stale = dict.fromkeys(("seq_length", "max_seq_len", "model_max_length", "n_positions",
                           "max_sequence_length", "max_seq_length", "seq_len"), NATIVE)
    path.write_text(json.dumps({**json.loads(path.read_text()), **stale}))
    out = rescale(damaged, tmp_path / "out", target_len=TARGET, method=method,
                  **REQUIRED.get(method, {}))
    assert reader(out) == TARGET


def test_linear_is_the_exception(llama, tmp_path):
    out = rescale(llama, tmp_path / "out", target_len=TARGET, method="linear")
    assert plain_length(out) == TARGET
    assert vllm_length(out) == sglang_length(out) == 16 * TARGET  # as METHODS["linear"] says
