"""The sizes of a model, its RoPE and its window, from `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError, CompatibilityError
from extend.model_config.families import SLIDING
from extend.model_config.rope_read import head_dim_of, read_rope
from extend.model_config.rope_spec import RopeSpec
from extend.untrusted import parse_json, read_bounded

_LARGEST = 2**53  # of a size; beyond it a JSON number is not exact everywhere


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What the toolkit needs to know of a model; `raw` is the whole file.

    `rope` is that of the layers with full attention. Where other types of layers have a RoPE of
    their own (Gemma 3: sliding_attention), it is in `rope_by_layer_type`, and no rescaling touches
    it.
    """

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
    rope_by_layer_type: Mapping[str, RopeSpec] = field(default_factory=dict)

    @property
    def sliding_window(self) -> int | None:
        """Window in tokens when some layer attends through one, else None."""
        window = self.raw.get("sliding_window")
        if window is None or self.raw.get("use_sliding_window") is False:
            return None
        layer_types = self.raw.get("layer_types")
        if layer_types and SLIDING not in layer_types:
            return None
        return int(window)


def read_config(directory: Path | str) -> ModelConfig:
    """Read `config.json` of a checkpoint directory.

    Raises:
        CheckpointError: no such directory or file, or it is not JSON.
        CompatibilityError: a model this toolkit cannot treat (quantized, no RoPE), or
            contradictory keys.
    """
    path = Path(directory) / "config.json"
    raw = read_json(path)
    found = raw.get("quantization_config")
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        raise CompatibilityError(f"{path}: the weights are quantized ({method}); dequantize the "
                                 "model first and give that checkpoint")
    return parse_config(raw, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, not JSON, or not an object.
    """
    try:
        data = parse_json(read_bounded(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give the directory of a checkpoint in "
                              "Hugging Face format") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(data).__name__}, not an object")
    return data


def parse_config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """Turn the keys of a config.json into a `ModelConfig`; `path` is for messages.

    Raises:
        CheckpointError: a value of the wrong kind.
        CompatibilityError: a key is missing, or keys contradict one another.
    """
    try:
        return _parse(raw, path)
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(f"{path}: a key holds a value of the wrong kind ({error})") from None


def _parse(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise CompatibilityError(f"{path}: key {key!r} is missing; only decoder models with "
                                     "Llama-style configs are supported")
        return raw[key]

    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers",
                "max_position_embeddings"):
        _check_whole(key, need(key), 1, path)
    if raw.get("sliding_window") is not None:
        _check_whole("sliding_window", raw["sliding_window"], 0, path)
    heads, head_dim = int(raw["num_attention_heads"]), head_dim_of(raw)
    rope, others = read_rope(raw, head_dim, path)
    return ModelConfig(
        path=path, raw=dict(raw), architecture=(raw.get("architectures") or ["unknown"])[0],
        hidden_size=int(need("hidden_size")), num_layers=int(need("num_hidden_layers")),
        num_heads=heads, num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=head_dim, intermediate_size=int(need("intermediate_size")),
        vocab_size=int(need("vocab_size")),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_position_embeddings=int(need("max_position_embeddings")),
        rope=rope, rope_by_layer_type=others)


def _check_whole(key: str, value: Any, least: int, path: Path) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value < _LARGEST or value != int(value):
        raise CheckpointError(f"{path}: {key} is {value!r}; it must be a whole number from {least}")
