"""A typed view of an HF `config.json`, and the one place that reads and writes RoPE keys.

Readers disagree on where RoPE lives: transformers 4 reads `rope_theta` and `rope_scaling`,
transformers 5 `rope_parameters`, llama.cpp a top-level `original_max_position_embeddings`. A file
that holds only one spelling silently becomes theta 10000 in the others, so all are written.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError, CompatibilityError

DEFAULT_ROPE_THETA = 10000.0  # what transformers assumes when no key names it
STALE_LENGTH_KEYS = ("seq_length", "max_seq_len", "model_max_length", "max_sequence_length",
                     "max_seq_length", "seq_len", "n_positions")
_THETA_KEYS = ("rope_theta", "rotary_emb_base", "rope_base")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Everything that determines a model's rotary embedding.

    Attributes:
        rope_theta: base of the geometric progression of wavelengths.
        rotary_dim: rotated channels per head (<= head_dim).
        original_len: tokens, the length that `scaling` counts its factor from; for plain RoPE the
            model's own length.
        scaling: the HF `rope_parameters` entries other than `rope_theta`, such as
            `rope_type` and `factor`; empty means plain RoPE.
    """

    rope_theta: float
    rotary_dim: int
    original_len: int
    scaling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rope_type(self) -> str:
        return str(self.scaling.get("rope_type", "default"))

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies are chosen by the length of what is read."""
        return depends_on_length(self.scaling)

    def to_json(self) -> dict[str, Any]:
        return {"rope_theta": self.rope_theta, "rotary_dim": self.rotary_dim,
                "original_len": self.original_len, "scaling": dict(self.scaling)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RopeSpec":
        return cls(rope_theta=float(data["rope_theta"]), rotary_dim=int(data["rotary_dim"]),
                   original_len=int(data["original_len"]), scaling=dict(data["scaling"]))


def depends_on_length(scaling: Mapping[str, Any]) -> bool:
    """Whether RoPE with these entries turns otherwise in a long row than in a short one."""
    kind = scaling.get("rope_type")
    return kind == "dynamic" or (
        kind == "longrope" and scaling.get("short_factor") != scaling.get("long_factor"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What the toolkit needs to know of a model; `raw` is the whole file."""

    path: Path
    raw: Mapping[str, Any]
    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: RopeSpec

    @property
    def sliding_window(self) -> int | None:
        """Window in tokens when some layer attends through one, else None."""
        window = self.raw.get("sliding_window")
        if window is None or self.raw.get("use_sliding_window") is False:
            return None
        layer_types = self.raw.get("layer_types")
        if layer_types and "sliding_attention" not in layer_types:
            return None
        return int(window)


def read_config(directory: Path | str) -> ModelConfig:
    """Read `config.json` of a checkpoint directory.

    Raises:
        CheckpointError: no such directory or file, or it is not JSON.
        CompatibilityError: a model this toolkit cannot treat (quantized, no RoPE, per-layer RoPE).
    """
    path = Path(directory) / "config.json"
    raw = read_json(path)
    try:
        if raw.get("quantization_config"):
            method = raw["quantization_config"].get("quant_method", "unknown")
            raise CompatibilityError(
                f"{path}: the weights are quantized ({method}); dequantize the model first and "
                "give that checkpoint")
        return parse_config(raw, path)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: a key holds a value of the wrong kind ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give the directory of a checkpoint in "
                              "Hugging Face format") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(data).__name__}, not an object")
    return data


def parse_config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """Turn the keys of a config.json into a `ModelConfig`; `path` is for messages."""
    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise CompatibilityError(f"{path}: key {key!r} is missing; only decoder models with "
                                     "Llama-style configs are supported")
        return raw[key]

    heads = int(need("num_attention_heads"))
    head_dim = int(raw.get("head_dim") or int(need("hidden_size")) // heads)
    return ModelConfig(
        path=path, raw=dict(raw), architecture=(raw.get("architectures") or ["unknown"])[0],
        hidden_size=int(need("hidden_size")), num_layers=int(need("num_hidden_layers")),
        num_heads=heads, num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=head_dim, intermediate_size=int(need("intermediate_size")),
        vocab_size=int(need("vocab_size")),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_position_embeddings=int(need("max_position_embeddings")),
        rope=_read_rope(raw, head_dim, path))


def _read_rope(raw: Mapping[str, Any], head_dim: int, path: Path) -> RopeSpec:
    """RoPE keys in every spelling, with the precedence of transformers 5."""
    parameters = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if any(isinstance(v, Mapping) for v in parameters.values()):
        raise CompatibilityError(f"{path}: RoPE differs per layer type ({', '.join(parameters)}); "
                                 "such models are not supported yet")
    rope_type = str(parameters.pop("rope_type", None) or parameters.pop("type", "default"))
    parameters.pop("type", None)
    theta = _single_theta(raw, parameters, path)
    partial = float(parameters.pop("partial_rotary_factor", None)
                    or raw.get("partial_rotary_factor") or 1.0)
    original = None
    if rope_type == "default":
        parameters = {}
    else:
        original = _agreed("original_max_position_embeddings", parameters, raw, path)
    scaling = {"rope_type": rope_type, **parameters} if rope_type != "default" else {}
    return RopeSpec(rope_theta=theta, rotary_dim=int(head_dim * partial), scaling=scaling,
                    original_len=int(original or raw["max_position_embeddings"]))


def _single_theta(raw: Mapping[str, Any], parameters: dict[str, Any], path: Path) -> float:
    inner = parameters.pop("rope_theta", None)
    outer = next((raw[key] for key in _THETA_KEYS if raw.get(key) is not None), None)
    if inner is None:
        inner = (raw.get("rope_parameters") or {}).get("rope_theta")
    found = _agreed("rope_theta", {"rope_theta": inner}, {"rope_theta": outer}, path)
    return found if found is not None else DEFAULT_ROPE_THETA


def _agreed(key: str, inner: Mapping[str, Any], outer: Mapping[str, Any],
            path: Path) -> float | None:
    """The value of `key` in the RoPE entries and at the top level, which must not differ."""
    values = [float(place[key]) for place in (inner, outer) if place.get(key) is not None]
    if len(set(values)) > 1:
        raise CompatibilityError(
            f"{path}: {key} is {outer[key]} at the top but {inner[key]} in rope_parameters, so "
            "loaders disagree; put the right value in both")
    return values[0] if values else None


def write_rope(raw: Mapping[str, Any], rope: RopeSpec, max_len: int) -> dict[str, Any]:
    """Return a copy of `raw` whose RoPE and length keys agree in every spelling.

    Args:
        rope: the RoPE to write.
        max_len: tokens, the new `max_position_embeddings`.
    """
    config = {k: v for k, v in raw.items() if k not in STALE_LENGTH_KEYS and k not in _THETA_KEYS}
    config.pop("original_max_position_embeddings", None)
    places = (raw, raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {})
    partial = next((place["partial_rotary_factor"] for place in places
                    if place.get("partial_rotary_factor") is not None), None)
    inner = {"rope_theta": rope.rope_theta, **(rope.scaling or {"rope_type": "default"})}
    if partial is not None:
        config["partial_rotary_factor"] = inner["partial_rotary_factor"] = partial
    config["rope_theta"] = rope.rope_theta
    config["rope_parameters"] = inner
    config["rope_scaling"] = dict(inner) if rope.scaling else None
    if rope.scaling:
        # llama.cpp looks for it at the top level only, and falls back to 8192. For linear, which
        # has no such entry, it is the only record of the native length.
        config["original_max_position_embeddings"] = rope.original_len
    config["max_position_embeddings"] = max_len
    return config
