"""The files of a checkpoint or adapter directory that a doctor looks at, checked for sense."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extend.adapter_format.sidecar import SIDECAR_JSON, read_sidecar
from extend.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from extend.doctor.reading import FULL, ModelFiles
from extend.errors import CheckpointError, CompatibilityError
from extend.model_config import STALE_LENGTH_KEYS, read_json

ADAPTER_CONFIG = "adapter_config.json"
FILE_NAMES = ("config.json", "tokenizer_config.json", "generation_config.json")
_LARGEST = 2**62  # tokens; a number above it is no length
_LARGEST_THETA, _LARGEST_FACTOR = 1e30, 1e9  # beyond any use, and still far from an overflow
_LENGTHS = ("max_position_embeddings", "original_max_position_embeddings", "sliding_window",
            "max_window_layers", "n_ctx", "max_target_positions", *STALE_LENGTH_KEYS)
_COUNTS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "head_dim")
_THETAS = ("rope_theta", "rotary_emb_base", "rope_base", "rope_local_base_freq")
_SHARES = ("partial_rotary_factor", "rotary_pct")
_POSITIVE = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
             "attention_factor", "attn_factor", "short_mscale", "long_mscale", "mscale",
             "mscale_all_dim")
_LISTS = ("short_factor", "long_factor")
_ARCHITECTURES = {"Gemma3ForCausalLM": "gemma3_text", "Phi3ForCausalLM": "phi3",
                  "Qwen2MoeForCausalLM": "qwen2_moe", "Qwen3MoeForCausalLM": "qwen3_moe",
                  "GPTNeoXForCausalLM": "gpt_neox", "Olmo2ForCausalLM": "olmo2"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Patient:
    """A directory as it was found.

    Attributes:
        files: what the readers read.
        remarks: what was not looked at, and why.
        is_adapter: `files.config` was put together from an adapter's sidecar.
        frequency_tensors: names of stored rotary frequencies in the weights.
    """

    directory: Path
    files: ModelFiles
    remarks: tuple[str, ...] = ()
    is_adapter: bool = False
    frequency_tensors: tuple[str, ...] = ()


def examine(directory: Path | str) -> Patient:
    """Read a checkpoint directory, or the sidecar of an adapter directory.

    Raises:
        CheckpointError: a file is missing, not JSON, or holds a value of the wrong kind.
        CompatibilityError: a model whose RoPE is not described by these keys, or an adapter
            without a sidecar.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give the directory of a "
                              "checkpoint or of an adapter")
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file():
        return _examine_adapter(directory)
    found = {name: read_json(directory / name) if (directory / name).is_file() else {}
             for name in FILE_NAMES[1:]}
    files = ModelFiles(read_json(directory / "config.json"), *found.values())
    check_values(files, directory)
    remarks = [f"no {name}" for name in FILE_NAMES[1:] if not (directory / name).is_file()]
    tensors: tuple[str, ...] = ()
    if (directory / SINGLE_NAME).is_file() or (directory / INDEX_NAME).is_file():
        tensors = tuple(name for name in Checkpoint(directory).names
                        if name.endswith("rotary_emb.inv_freq"))
    else:
        remarks.append("no safetensors weights here: the configuration alone was looked at")
    return Patient(directory=directory, files=files, remarks=tuple(remarks),
                   frequency_tensors=tensors)


def _examine_adapter(directory: Path) -> Patient:
    """The config that `extend merge` would write into a target, from what the sidecar records."""
    sidecar = read_sidecar(directory)
    if sidecar is None:
        raise CompatibilityError(
            f"{directory}: a LoRA adapter without {SIDECAR_JSON}, so it records no RoPE and no "
            "length; extract it again with `extend extract`, or give `extend merge` the long "
            "model with --rope-from")
    base = sidecar.base
    config = {**sidecar.rope.config_keys, "architectures": [base.architecture],
              "model_type": _model_type(base.architecture), "head_dim": base.head_dim,
              "num_attention_heads": base.num_heads, "num_hidden_layers": base.num_layers,
              "hidden_size": base.head_dim * base.num_heads}
    files = ModelFiles(config, {}, {})
    check_values(files, directory, name=SIDECAR_JSON)
    return Patient(directory=directory, files=files, is_adapter=True, remarks=(
        "an adapter: what its sidecar would write into the config of a merge's target",))


def _model_type(architecture: str) -> str:
    plain = architecture.removesuffix("ForCausalLM").lower()
    return _ARCHITECTURES.get(architecture, plain)


def check_values(files: ModelFiles, directory: Path, name: str = FILE_NAMES[0]) -> None:
    """Check the kinds and ranges of everything that a reader will compute with.

    Raises:
        CheckpointError: a value of the wrong kind, not finite, or out of range.
        CompatibilityError: see `examine`.
    """
    config, where = files.config, str(directory / name)
    for key in ("rope_scaling", "rope_parameters", "dual_chunk_attention_config"):
        if config.get(key) is not None and not isinstance(config[key], Mapping):
            _wrong(where, key, config[key], "an object or null")
    _refuse_other_rope(config, where)
    for key in ("num_attention_heads", "max_position_embeddings"):
        if config.get(key) is None:
            raise CheckpointError(f"{where}: key {key!r} is missing; write it (readers would "
                                  "assume different defaults)")
    if config.get("head_dim") is None and config.get("hidden_size") is None:
        raise CheckpointError(f"{where}: neither head_dim nor hidden_size is there, so the size "
                              "of a head is not known")
    _check_numbers(config, where)
    for entries, place in _rope_entries(config):
        _check_numbers(entries, where, place)
    _check_names(config, where)
    cap = files.tokenizer_config.get("model_max_length")
    if cap is not None and not _is_number(cap, 0, math.inf):
        _wrong(str(directory / FILE_NAMES[1]), "model_max_length", cap, "a number above 0")
    longest = files.generation_config.get("max_length")
    if longest is not None and not _is_number(longest, 0, _LARGEST):
        _wrong(str(directory / FILE_NAMES[2]), "max_length", longest, "a number above 0")


def _check_names(config: Mapping[str, Any], where: str) -> None:
    types, kind = config.get("layer_types"), config.get("model_type")
    if types is not None and not (isinstance(types, list)
                                  and all(isinstance(name, str) for name in types)):
        _wrong(where, "layer_types", types, "a list of names")
    if kind is not None and not isinstance(kind, str):
        _wrong(where, "model_type", kind, "a name")
    for key in ("rope_scaling", "rope_parameters"):
        for name, entries in (config.get(key) or {}).items():
            if name in {FULL, "sliding_attention", *(types or ())} and not (
                    entries is None or isinstance(entries, Mapping)):
                _wrong(where, f"{key}.{name}", entries, "an object or null")


def _refuse_other_rope(config: Mapping[str, Any], where: str) -> None:
    entries = [*(e for e, _ in _rope_entries(config))]
    if config.get("quantization_config") is not None:
        return  # RoPE is not quantized; the keys mean the same
    if isinstance(config.get("text_config"), Mapping):
        raise CompatibilityError(f"{where}: a model of several parts (text_config); their RoPE is "
                                 "not looked at, save the text model alone")
    if config.get("qk_rope_head_dim") is not None or config.get("kv_lora_rank") is not None:
        raise CompatibilityError(f"{where}: latent attention (qk_rope_head_dim); each engine has "
                                 "rules of its own for it, which this program does not know")
    if any("mrope_section" in e or "xdrope_section" in e for e in entries):
        raise CompatibilityError(f"{where}: positions of several dimensions (mrope_section); only "
                                 "text models are looked at")


def _rope_entries(config: Mapping[str, Any]) -> Iterable[tuple[Mapping[str, Any], str]]:
    """`rope_scaling` and `rope_parameters`, and what is nested in them by layer type."""
    for key in ("rope_scaling", "rope_parameters"):
        entries = config.get(key) or {}
        yield entries, f"{key}."
        for name, nested in entries.items():
            if isinstance(nested, Mapping):
                yield nested, f"{key}.{name}."


def _check_numbers(entries: Mapping[str, Any], where: str, place: str = "") -> None:
    for key, value in entries.items():
        problem = _problem(key, value) if value is not None else None
        if problem:
            _wrong(where, place + key, value, problem)


def _problem(key: str, value: Any) -> str | None:
    """What `value` should have been, or None when it is right for `key`."""
    if key in _LENGTHS or key in _COUNTS:
        least = 0 if key in ("max_window_layers", "sliding_window") else 1
        whole = isinstance(value, int) and _is_number(value, least - 1, _LARGEST)
        return None if whole else f"a whole number from {least} to 2^62"
    if key in _THETAS:
        return None if _is_number(value, 1, _LARGEST_THETA) else "a number above 1, below 1e30"
    if key in _SHARES:
        return None if _is_number(value, 0, 1) or value == 1 else "a number above 0, at most 1"
    if key == "factor":
        right = _is_number(value, 0, _LARGEST_FACTOR) and value >= 1
        return None if right else "a number from 1, below 1e9: a context is stretched"
    if key in _POSITIVE:
        least = -1.0 if key.startswith("mscale") else 0.0
        right = _is_number(value, least, _LARGEST_FACTOR)
        return None if right else "a number above 0, below 1e9"
    if key in _LISTS:
        right = isinstance(value, list) and all(_is_number(v, 0, _LARGEST_FACTOR) for v in value)
        return None if right else "a list of numbers above 0, below 1e9"
    if key in ("rope_type", "type"):
        return None if isinstance(value, str) else "a name"
    return None


def _is_number(value: Any, above: float, below: float) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)
            and above < value < below)


def _wrong(where: str, key: str, value: Any, wanted: str) -> None:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    raise CheckpointError(f"{where}: {key} is {shown}, but it must be {wanted}; correct the file")
