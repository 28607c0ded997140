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

from extend.model_config import RopeSpec, read_config, write_rope
from extend.rope import rescale
from extend.rope.frequencies import attention_factor, inv_freq
from tests.rope.conftest import NATIVE
from tests.rope.specs import ANY_BASE, LLAMA3, TINY, call, options_for

TARGET = 16 * NATIVE
# Readers multiply max_position_embeddings by the factor of rope_type linear, and of no other type.
NOT_LINEAR = [m for m in ANY_BASE if m != "linear"]


@pytest.fixture(params=[*ANY_BASE, "yarn with resonance"])
def written(request, llama, tmp_path) -> tuple[str, Path, RopeSpec]:
    method, _, resonance = request.param.partition(" with ")
    out = rescale(llama, tmp_path / "out", target_len=TARGET, method=method,
                  **options_for(method, TINY), **({"resonance": True} if resonance else {}))
    return method, out, read_config(out).rope


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


# --- frequencies ---

def closed_form(theta: float, dim: int, scaling: dict, original: int) -> np.ndarray:
    """inv_freq [dim / 2], pair by pair, from the definitions of the rope types."""
    found = []
    for i in range(dim // 2):
        plain = theta ** (-2 * i / dim)
        factor = scaling.get("factor", 1.0)
        kind = scaling.get("rope_type", "default")
        if kind == "default":
            kept = 1.0
        elif kind == "linear":
            kept = 0.0
        elif kind == "longrope":
            kept, factor = 0.0, scaling["long_factor"][i]
        elif kind == "proportional":
            kept = 1.0 if i < dim * scaling["partial_rotary_factor"] // 2 else math.inf
        elif kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = (original * plain / (2 * math.pi) - low) / (high - low)
        else:
            first, last = (dim * math.log(original / (count * 2 * math.pi)) / (2 * math.log(theta))
                           for count in (32, 1))
            first, last = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
            kept = 1 - (i - first) / (last - first)
        if kept == math.inf:
            found.append(0.0)
            continue
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


# --- attention factor ---

def attention_by_transformers(config: dict) -> float:
    """Versions 4 and 5; they do not know the keys of vLLM."""
    scaling = config["rope_scaling"] or {}
    factor = scaling.get("factor", 1.0)
    if scaling.get("rope_type") == "longrope":
        return scaling.get("attention_factor") or math.sqrt(
            1 + math.log(factor) / math.log(scaling["original_max_position_embeddings"]))
    if scaling.get("rope_type") == "yarn":
        return scaling.get("attention_factor") or 0.1 * math.log(factor) + 1
    return 1.0


def attention_by_vllm(config: dict) -> float:
    """SGLang as well; they do not know attention_factor, and take the ratio of the lengths."""
    scaling = config["rope_parameters"]
    if scaling["rope_type"] == "longrope":
        native = scaling["original_max_position_embeddings"]
        ratio = config["max_position_embeddings"] / native
        computed = math.sqrt(1 + math.log(ratio) / math.log(native)) if ratio > 1 else 1.0
        return scaling.get("long_mscale", computed)
    return 0.1 * math.log(scaling["factor"]) + 1 if scaling["rope_type"] == "yarn" else 1.0


@pytest.mark.parametrize("reader", [attention_by_transformers, attention_by_vllm])
def test_every_reader_finds_the_same_attention_factor(reader, written):
    _, out, spec = written
    assert reader(config_of(out)) == pytest.approx(attention_factor(spec), rel=1e-14)


@pytest.mark.parametrize("options", [
    {"beta_fast": 4.0}, {"beta_slow": 0.5, "beta_fast": 8.0}, {"attention_factor": 1.5},
    {"truncate": False}, {"mscale": 0.707, "mscale_all_dim": 1.0}])
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
    if rope["rope_type"] == "longrope":  # unless told how long a text may be
        return config["original_max_position_embeddings"]
    if rope["rope_type"] in ("default", "su", "llama3"):
        return found
    return int(found * rope.get("factor", 1))


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
                  **options_for(method, TINY))
    assert reader(out) == TARGET


def test_linear_is_the_exception(llama, tmp_path):
    out = rescale(llama, tmp_path / "out", target_len=TARGET, method="linear")
    assert plain_length(out) == TARGET
    assert vllm_length(out) == sglang_length(out) == 16 * TARGET  # as METHODS["linear"] says
