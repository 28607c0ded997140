"""`serving.json` and `SERVING.md`: how to serve an adapter, or a merged checkpoint, at its length.

An adapter carries no RoPE: the engine computes the base with one RoPE for all requests, so it must
be started with the long one. A merged checkpoint says all of it in its own config.json.

Source: vllm 0.33.0, vllm/config/model.py (`_apply_dict_overrides` sets dictionaries after all else;
`_get_and_verify_max_len` takes the tokenizer's length for a limit); sglang 0.5.23,
sglang/srt/utils/hf_transformers/config.py (overrides are set in their order) and
arg_groups/fields/lora.py; ggml-org/llama.cpp, common/arg.cpp.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from extend.adapter_format.serving import OK, ServingVerdict, check_serving
from extend.adapter_format.serving_view import read_view
from extend.adapter_format.sidecar import RopeChange, Sidecar
from extend.errors import CompatibilityError
from extend.model_config import RopeSpec, read_json, yarn_mscale
from extend.output import write_json

SERVING_JSON, SERVING_MD = "serving.json", "SERVING.md"
SCHEMA = 1
ADAPTER_DIR, MODEL_DIR = "ADAPTER_DIR", "MODEL_DIR"  # places to fill in: directories move
_ALLOW_LONG = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}


def rope_override(change: RopeChange) -> dict[str, Any]:
    """The base's config keys to override in an engine on transformers 5.

    They are the sidecar's, less `rope_scaling`: to a loaded config of transformers 5 that is
    another name for `rope_parameters`, so that its null, or its shorter entries, would take their
    place. `rope_parameters` is the last to be set.
    """
    keys = {k: v for k, v in change.config_keys.items() if k != "rope_scaling"}
    return {**{k: v for k, v in keys.items() if k != "rope_parameters"},
            "rope_parameters": keys["rope_parameters"]}


def sglang_override(change: RopeChange) -> dict[str, Any]:
    """The same for SGLang, which lays a RoPE over the keys of the one before; a null clears them.
    """
    return {"rope_scaling": None, **rope_override(change)}


def adapter_serving(directory: Path, *, tokenizer_dir: Path | None = None,
                    notes: Sequence[str] = ()) -> dict[str, Any]:
    """The content of an adapter's `serving.json`.

    Args:
        directory: the adapter, with a sidecar.
        tokenizer_dir: the base, for the length that its tokenizer names; None where it is unknown.
        notes: what engines are known to make of this RoPE, one sentence each.

    Raises:
        CompatibilityError: no sidecar, so no RoPE to serve it with.
    """
    view = read_view(directory)
    if view.sidecar is None:
        raise CompatibilityError(f"{directory}: has no sidecar, so nothing says which RoPE it is "
                                 "to be served with; extract it with `extend extract`")
    change, base = view.sidecar.rope, str(view.config.get("base_model_name_or_path") or "BASE_DIR")
    length, verdicts = change.max_position_embeddings_after, check_serving(directory)
    commands = {"vllm": _vllm(base, length, json.dumps(rope_override(change))),
                "sglang": _sglang(base, length, json.dumps(sglang_override(change)))}
    engines = {v.engine: v.to_json() for v in verdicts}
    for verdict in verdicts:
        if verdict.engine in commands and verdict.max_rank is not None:
            engines[verdict.engine]["command"] = [
                *commands[verdict.engine], "--max-lora-rank", str(verdict.max_rank)]
    if _tokenizer_length(tokenizer_dir) < length:
        engines["vllm"]["environment"] = _ALLOW_LONG
    engines["llama.cpp"] = {"command": _llama_cpp(change, length)}
    return {"schema": SCHEMA, "kind": "adapter", "base": base, "max_model_len": length,
            "rope_override": rope_override(change), "config_keys": change.config_keys,
            "engines": engines, "unserved": unserved(view.sidecar), "notes": list(notes)}


def checkpoint_serving(length: int, *, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a merged checkpoint's `serving.json`; `length` in tokens."""
    size = str(length)
    return {"schema": SCHEMA, "kind": "checkpoint", "max_model_len": length, "engines": {
        "vllm": {"command": ["vllm", "serve", MODEL_DIR, "--max-model-len", size]},
        "sglang": {"command": ["python", "-m", "sglang.launch_server", "--model-path", MODEL_DIR,
                               "--context-length", size]},
        "llama.cpp": {"prepare": ["python", "convert_hf_to_gguf.py", MODEL_DIR, "--outfile",
                                  "model.gguf"],
                      "command": ["llama-server", "-m", "model.gguf", "-c", size]}},
        "notes": list(notes)}


def unserved(sidecar: Sidecar) -> dict[str, Any]:
    """What no engine gets from the adapter files: how many deltas, and the largest one."""
    held = {**sidecar.tensors, **sidecar.experts}
    largest = max(held, key=lambda name: held[name].relative_norm or 0.0, default=None)
    return {"tensors": len(held), "largest": largest,
            "relative_norm": held[largest].relative_norm if largest else None}


def _vllm(base: str, length: int, override: str) -> list[str]:
    return ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"long={ADAPTER_DIR}",
            "--max-model-len", str(length), "--hf-overrides", override]


def _sglang(base: str, length: int, override: str) -> list[str]:
    return ["python", "-m", "sglang.launch_server", "--model-path", base, "--lora-paths",
            f"long={ADAPTER_DIR}", "--context-length", str(length),
            "--json-model-override-args", override]


def _llama_cpp(change: RopeChange, length: int) -> list[str] | None:
    """With both files converted before; None where no switch says the RoPE: merge first."""
    rope = RopeSpec.from_json(change.after)
    flags = None if change.by_layer_type else llama_cpp_flags(rope)
    if flags is None:
        return None
    return ["llama-server", "-m", "base.gguf", "--lora", "adapter.gguf", "-c", str(length), *flags]


def llama_cpp_flags(rope: RopeSpec) -> list[str] | None:
    """llama.cpp's switches for a RoPE; None where it has none for it."""
    base, scaling = ["--rope-freq-base", f"{rope.rope_theta:.12g}"], rope.scaling
    if rope.rope_type == "default":
        return ["--rope-scaling", "none", *base]
    if rope.rope_type == "linear":
        return ["--rope-scaling", "linear", "--rope-scale", f"{scaling['factor']:.12g}", *base]
    usual = scaling.get("attention_factor") in (None, yarn_mscale(scaling.get("factor", 1.0)))
    if rope.rope_type != "yarn" or scaling.get("truncate") is False or not usual:
        return None
    ramp = [f"{scaling.get(key, default):g}" for key, default in (("beta_fast", 32),
                                                                  ("beta_slow", 1))]
    return ["--rope-scaling", "yarn", "--rope-scale", f"{scaling['factor']:.12g}",
            "--yarn-orig-ctx", str(rope.original_len), "--yarn-beta-fast", ramp[0],
            "--yarn-beta-slow", ramp[1], *base]


def _tokenizer_length(directory: Path | None) -> float:
    path = directory / "tokenizer_config.json" if directory else None
    found = read_json(path).get("model_max_length") if path and path.is_file() else None
    return float("inf") if found is None else found


def write_serving(directory: Path, serving: Mapping[str, Any]) -> None:
    """Write both files into `directory`."""
    write_json(directory / SERVING_JSON, serving)
    (directory / SERVING_MD).write_text(_text(serving), encoding="utf-8")


def command_line(engine: Mapping[str, Any]) -> str:
    """The engine's command as a line for a shell."""
    settings = [f"{key}={value}" for key, value in engine.get("environment", {}).items()]
    return " ".join([*settings, shlex.join(engine["command"])])


def verdict_line(verdicts: Sequence[ServingVerdict]) -> str:
    """One line about all engines, for a log."""
    parts = [f"{v.engine} {v.verdict}" + (f" (--max-lora-rank {v.max_rank})"
                                          if v.verdict == OK else "")
             for v in verdicts if v.current]
    return f"as served by {', '.join(parts)}; {SERVING_MD} has the commands"


def _text(serving: Mapping[str, Any]) -> str:
    adapter = serving["kind"] == "adapter"
    lines = ["# Serving", "", f"For contexts of up to {serving['max_model_len']} tokens. "
             + (f"Put the path of this directory in the place of {ADAPTER_DIR}. The engine gives "
                "requests without the adapter the long RoPE, too." if adapter else
                f"Put the path of this directory in the place of {MODEL_DIR}.")]
    for name, engine in serving["engines"].items():
        lines += _engine_text(name, engine)
    if adapter and serving["unserved"]["tensors"]:
        lost = serving["unserved"]
        size = "" if lost["relative_norm"] is None else (
            f" (|delta| / |W| {lost['relative_norm']:.2e})")
        lines += ["", f"{lost['tensors']} deltas (norms, biases, embeddings, fused experts) "
                  "lie in the sidecar and reach no engine; "
                  f"the largest is that of {lost['largest']}{size}. `extend "
                  "merge` applies them; `extend extract --fold-norms` carries those of most norms "
                  "inside the matrices."]
    for note in serving["notes"]:
        lines += ["", f"{note[0].upper()}{note[1:]}."]
    return "\n".join(lines) + "\n"


def _engine_text(name: str, engine: Mapping[str, Any]) -> list[str]:
    version = f" {engine['version']}" if "version" in engine else ""
    verdict = f": {engine['verdict']}" if "verdict" in engine else ""
    lines = ["", f"## {name}{version}{verdict}"]
    for problem in engine.get("problems", ()):
        lines += ["", f"- {problem['message']} -> {problem['remedy']}"]
    if engine.get("command"):
        prepare = [shlex.join(engine["prepare"])] if "prepare" in engine else []
        lines += ["", "```", *prepare, command_line(engine), "```"]
    elif name == "llama.cpp":
        lines += ["", "It has no switch for this RoPE: merge first, and convert the result."]
    return lines
