"""The `rescale` stage: the same weights under another RoPE.

Weights are hard-linked (or copied) and never loaded, except when the file stores the rotary
frequencies as tensors: those would contradict the new config, so the weights are streamed into
new files without them.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from extend.checkpoint import INDEX_NAME, Checkpoint, copy_side_files, write_checkpoint
from extend.errors import CompatibilityError, RecipeError
from extend.inputs import takes_models
from extend.manifest import Manifest
from extend.model_config import ModelConfig, RopeSpec, read_config, write_rope
from extend.output import atomic_directory, copy_or_link, require_apart, write_json
from extend.registry import lookup
from extend.rope.engines import differing_engines
from extend.rope.factors import describe_extension
from extend.rope.methods import apply_method

logger = logging.getLogger(__name__)

# Entries that only ever extend a context; others are part of a model.
SCALING_KEYS = frozenset({
    "rope_type", "factor", "original_max_position_embeddings", "attention_factor", "attn_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor",
    "high_freq_factor", "short_factor", "long_factor", "short_mscale", "long_mscale", "finetuned",
    "extrapolation_factor"})
_FREQUENCY_TENSOR = "rotary_emb.inv_freq"
# Families whose layers all see everything once `sliding_window` is null. The others read per-layer
# keys as well, and build masks from the number even where no layer uses it.
_NULL_MEANS_FULL = {"mistral", "mixtral", "phi3", "phimoe", "starcoder2"}


@takes_models("model")
def rescale(model: Path | str, out: Path | str, *, target_len: int, method: str = "critical",
            overwrite: bool = False, sliding_window: str = "refuse", from_len: int | None = None,
            **options: Any) -> Path:
    """Write the checkpoint `model` to `out` with the RoPE and length of a longer context.

    Args:
        model: checkpoint directory in Hugging Face format, safetensors weights.
        out: directory to create.
        target_len: tokens, the new context length.
        method: one of `extend.rope.METHODS`.
        overwrite: replace `out` if it exists.
        sliding_window: what to do with an active attention window shorter than `target_len`, one
            of `SLIDING_WINDOW`.
        from_len: tokens; for a model that is extended already, or whose config does not tell its
            native length: start again from plain RoPE at this length.
        options: of the method, and `resonance`.

    Returns:
        `out`.

    Raises:
        RecipeError: unknown method or option, or `target_len` below the native length.
        CheckpointError: `model` is missing, damaged or incomplete, or `out` cannot be written.
        CompatibilityError: a model that cannot be rescaled as asked.
    """
    model, out = Path(model), Path(out)
    widen = lookup(SLIDING_WINDOW, sliding_window, "sliding_window")
    config = read_config(model)
    rope = apply_method(method, starting_rope(config, from_len), target_len, options)
    raw = write_rope(_widened(config, target_len, widen), rope, target_len)
    checkpoint = Checkpoint(model)
    check_shapes(checkpoint, config)
    require_apart(out, {"model": model})
    with atomic_directory(out, overwrite=overwrite, inputs={"model": model}) as partial:
        manifest = Manifest("rescale", {"model": model}, {
            "target_len": target_len, "method": method, "sliding_window": sliding_window,
            "from_len": from_len, **options})
        _write_weights(checkpoint, partial)
        copy_side_files(model, partial, max_len=target_len)
        write_json(partial / "config.json", raw)
        manifest.write(partial, rope_before=config.rope.to_json(), rope_after=rope.to_json(),
                       max_position_embeddings=target_len)
    differing = differing_engines(str(config.raw.get("model_type")), rope)
    if differing:
        logger.warning("not every engine reads %s alike: %s; `extend doctor %s` shows all", out,
                       "; ".join(differing), out)
    return out


def starting_rope(config: ModelConfig, from_len: int | None = None) -> RopeSpec:
    """The plain RoPE that a rescaling of the model starts from.

    Args:
        from_len: tokens, takes an earlier extension back to plain RoPE at this length; None keeps
            what the config has.

    Raises:
        CompatibilityError: the model is extended already and `from_len` is None or contradicts
            the config, or its RoPE was never plain.
        RecipeError: `from_len` is not a length.
    """
    rope = config.rope
    if from_len is None:
        if rope.scaling:
            raise CompatibilityError(
                f"{config.path}: the model is extended already: "
                f"{describe_extension(rope, config.max_position_embeddings)}. Start from the "
                "checkpoint before that, or give from_len (--from), its native length, to start "
                "again from plain RoPE")
        return rope
    if isinstance(from_len, bool) or not isinstance(from_len, int) or from_len < 1:
        raise RecipeError(f"from_len must be a number of tokens, not {from_len!r}")
    native, longest = rope.original_len, config.max_position_embeddings
    extended = native < longest
    own = sorted(set(rope.scaling) - SCALING_KEYS)
    if rope.rope_type == "proportional":  # some families are born with it
        own = [] if extended else ["rope_type proportional"]
    if extended and from_len != native:
        raise CompatibilityError(f"{config.path}: from_len is {from_len}, but the RoPE there was "
                                 f"extended from {native} tokens; give {native}")
    if not rope.scaling and from_len != native:
        logger.warning("theta %.10g is taken for that of %d native tokens, though the config says "
                       "%d: a theta that a rescaling has raised would be raised twice",
                       rope.rope_theta, from_len, native)
    if own:
        raise CompatibilityError(
            f"{config.path}: {', '.join(own)} in rope_parameters is no extension but part of the "
            "model, and from_len would take it away; such models are not supported")
    return replace(rope, original_len=from_len, scaling={})


def check_shapes(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Check that the weights are those of the config.

    Raises:
        CompatibilityError: no token embedding, or a shape or layer count that the config
            contradicts.
    """
    expected = {"embed_tokens.weight": (config.vocab_size, config.hidden_size),
                "self_attn.k_proj.weight": (config.num_kv_heads * config.head_dim,
                                            config.hidden_size)}
    for name, info in checkpoint.infos.items():
        for suffix, shape in expected.items():
            if name.endswith(suffix) and info.shape != shape:
                raise CompatibilityError(f"{checkpoint.directory}: {name} has shape {info.shape} "
                                         f"but config.json asks for {shape}; the two are not of "
                                         "one model")
    if not any(name.endswith("embed_tokens.weight") for name in checkpoint.infos):
        raise CompatibilityError(f"{checkpoint.directory}: holds no embed_tokens.weight; only "
                                 "decoder models with Llama-style names are supported")
    layers = {name.split(".layers.")[1].split(".")[0] for name in checkpoint.infos
              if ".layers." in name}
    if len(layers) != config.num_layers:
        raise CompatibilityError(f"{checkpoint.directory}: the weights hold {len(layers)} layers "
                                 f"but config.json asks for {config.num_layers}; the two are not "
                                 "of one model")


def _widened(config: ModelConfig, target_len: int,
             widen: Callable[[ModelConfig, int], dict[str, Any]]) -> Mapping[str, Any]:
    """The config's keys, with whatever limits attention below `target_len` treated by `widen`."""
    if config.raw.get("dual_chunk_attention_config"):
        raise CompatibilityError(
            f"{config.path}: dual_chunk_attention_config makes engines ignore the RoPE keys; "
            "remove it, or start from the checkpoint it was added to")
    window = config.sliding_window
    if window is None or window >= target_len:
        return config.raw
    return widen(config, target_len)


def _refuse_window(config: ModelConfig, target_len: int) -> dict[str, Any]:
    raise CompatibilityError(
        f"{config.path}: attention is limited to a sliding window of {config.sliding_window} "
        f"tokens, below the target length {target_len}; choose sliding_window 'drop' for full "
        "attention in every layer, or 'keep' to leave the window as it is")


def _drop_window(config: ModelConfig, target_len: int) -> dict[str, Any]:
    if config.rope_by_layer_type:
        # The type of a layer also chooses its RoPE, so it stays, and the window grows instead.
        changes: dict[str, Any] = {"sliding_window": target_len}
    else:
        changes = _full_attention(config)
    logger.warning("sliding window of %d tokens dropped: every layer attends to all %d tokens",
                   config.sliding_window, target_len)
    return {**config.raw, **changes}


def _full_attention(config: ModelConfig) -> dict[str, Any]:
    """Full attention in the keys that the config has: a key added to it can change its family.

    (transformers takes a `mistral` config with `layer_types` for another architecture.)
    """
    raw, changes = config.raw, {}
    if raw.get("layer_types"):
        changes["layer_types"] = ["full_attention"] * config.num_layers
    if "use_sliding_window" in raw:
        changes.update(sliding_window=None, use_sliding_window=False)
        if "max_window_layers" in raw:
            changes["max_window_layers"] = config.num_layers
    elif raw.get("model_type") in _NULL_MEANS_FULL and not changes:
        changes["sliding_window"] = None
    if not changes:
        raise CompatibilityError(
            f"{config.path}: which layers of model_type {raw.get('model_type')!r} use the sliding "
            "window is not in the config; add layer_types, one 'full_attention' or "
            "'sliding_attention' for each layer, then drop it")
    return changes


def _keep_window(config: ModelConfig, target_len: int) -> dict[str, Any]:
    logger.warning("sliding window of %d tokens kept: its layers do not see all %d tokens",
                   config.sliding_window, target_len)
    return dict(config.raw)


def _write_weights(checkpoint: Checkpoint, directory: Path) -> None:
    stored = [n for n in checkpoint.names if n.endswith(_FREQUENCY_TENSOR)]
    if stored:
        logger.info("%d stored rotary frequency tensors dropped; the weights are written anew",
                    len(stored))
        infos = [checkpoint.infos[n] for n in checkpoint.names if n not in set(stored)]
        write_checkpoint(directory, infos, checkpoint.read)
        return
    for file in checkpoint.files:
        copy_or_link(file, directory / file.name)
    index = checkpoint.directory / INDEX_NAME
    if index.is_file():
        shutil.copyfile(index, directory / INDEX_NAME)


SLIDING_WINDOW: dict[str, Callable[[ModelConfig, int], dict[str, Any]]] = {
    "refuse": _refuse_window,
    "drop": _drop_window,
    "keep": _keep_window,
}
