"""The gate before a merge: does the model that the deltas change fit the target?"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from extend.adapter_format.sidecar import HEAD_NAME, ModelIdentity, RopeChange
from extend.checkpoint import FLOAT_DTYPES, TensorInfo
from extend.delta.pair import is_vocabulary
from extend.delta.sources import DeltaSource
from extend.errors import CompatibilityError, RecipeError
from extend.model_config import ModelConfig, RopeSpec, read_config

_MAX_SHOWN = 4  # entries of a list


def context_change(sources: Sequence[DeltaSource], target: ModelConfig,
                   rope_from: Path | str | None) -> RopeChange:
    """The RoPE change to write: that of the deltas, or else of a long model.

    Deltas that leave the RoPE as it is, or do not know it (an adapter of another program), go with
    one that changes it.

    Raises:
        RecipeError: both a delta that knows the RoPE and `rope_from`.
        CompatibilityError: neither of them, two deltas with different RoPEs after, or a long model
            of another architecture.
    """
    known = {source.label: source.rope for source in sources if source.rope is not None}
    if rope_from is not None:
        if known:
            raise RecipeError(f"rope_from is {rope_from}, but {next(iter(known))} has a sidecar or "
                              "config that holds the RoPE; leave rope_from out")
        return _change_to(rope_from, target)
    changing = {label: rope for label, rope in known.items() if _changes(rope)}
    if known:
        return _agreed(changing or known)
    labels = ", ".join(source.label for source in sources)
    raise CompatibilityError(
        f"{labels}: a plain PEFT adapter does not say which RoPE it was trained with, and a long "
        "model with the wrong RoPE is broken; give --rope-from DIR, the long model or anything "
        "with its config.json")


def _changes(rope: RopeChange) -> bool:
    return (rope.before != rope.after or rope.max_position_embeddings_before
            != rope.max_position_embeddings_after)


def _agreed(changes: Mapping[str, RopeChange]) -> RopeChange:
    """The one RoPE after that all of them have."""
    (first, change), *others = changes.items()
    for label, other in others:
        mine = {**change.config_keys, **_rope_keys(RopeSpec.from_json(change.after))}
        theirs = {**other.config_keys, **_rope_keys(RopeSpec.from_json(other.after))}
        for key in sorted({*mine, *theirs}):
            if mine.get(key) != theirs.get(key):
                raise CompatibilityError(
                    f"{key} is {_shown(mine.get(key))} after {first} but "
                    f"{_shown(theirs.get(key))} after {label}; a model has one RoPE, so merge "
                    "deltas that were made for the same one")
    return change


def _change_to(rope_from: Path | str, target: ModelConfig) -> RopeChange:
    donor = read_config(rope_from)
    for field in ("architecture", "num_layers", "num_heads", "head_dim"):
        if getattr(donor, field) != getattr(target, field):
            raise CompatibilityError(
                f"{field} is {getattr(donor, field)} in {rope_from} but {getattr(target, field)} "
                f"in {target.path.parent}; take the RoPE from a long model of the target's own "
                "family")
    return RopeChange.between(target, donor)


def fit_problems(source: DeltaSource, config: ModelConfig,
                 infos: Mapping[str, TensorInfo]) -> list[str]:
    """Where a delta would do nothing, or something else than on its base; one line each.

    The number of embedding rows may differ: they are mapped by token.

    Args:
        config: of the target.
        infos: the target's `parameter_infos`.
    """
    problems: list[str] = []
    if source.identity is not None:
        problems += identity_problems(source.identity, config, infos, "the adapter's base")
    if source.rope is not None:
        problems += rope_problems(RopeSpec.from_json(source.rope.before), config.rope)
        problems += layer_type_problems(source.rope, config)
    return problems or name_problems(source, config, infos)


def identity_problems(base: ModelIdentity, config: ModelConfig, infos: Mapping[str, TensorInfo],
                      what: str) -> list[str]:
    """How the target differs from what it should be a fine-tune of, but for embedding rows."""
    target = ModelIdentity.of(config, infos)
    shapes = {name: base.shapes[name] if _same_but_rows(name, base.shapes.get(name), shape)
              else shape for name, shape in target.shapes.items()}
    alike = target.model_copy(update={"vocab_size": base.vocab_size, "shapes": shapes})
    return base.differences(alike, what, "the target")


def _same_but_rows(name: str, one: tuple[int, ...] | None, other: tuple[int, ...]) -> bool:
    return is_vocabulary(name) and one is not None and one[1:] == other[1:]


def rope_problems(base: RopeSpec, target: RopeSpec) -> list[str]:
    """How the target's RoPE differs from that of the adapter's base, one line each.

    A plain RoPE does not depend on any length, so `original_len` counts only where frequencies are
    scaled.
    """
    before, now = _rope_keys(base), _rope_keys(target)
    return [f"RoPE {key} is {_shown(before.get(key))} in the adapter's base but "
            f"{_shown(now.get(key))} in the target"
            for key in sorted({*before, *now}) if before.get(key) != now.get(key)]


def _shown(value: object) -> str:
    """A value for a message; of a long list, its first entries."""
    if isinstance(value, list) and len(value) > _MAX_SHOWN:
        first = ", ".join(f"{entry:g}" for entry in value[:_MAX_SHOWN])
        return f"[{first}, ... {len(value)} in all]"
    return "not set" if value is None else str(value)


def layer_type_problems(change: RopeChange, target: ModelConfig) -> list[str]:
    """The same for the layers without full attention that have a RoPE of their own."""
    base = {kind: RopeSpec.from_json(rope) for kind, rope in change.by_layer_type.items()}
    here = target.rope_by_layer_type
    lines = [f"{kind}: {line}" for kind in base if kind in here
             for line in rope_problems(base[kind], here[kind])]
    if set(base) != set(here):
        lines.append(f"layer types with a RoPE of their own are {', '.join(base) or 'none'} in the "
                     f"adapter's base but {', '.join(here) or 'none'} in the target")
    return lines


def _rope_keys(rope: RopeSpec) -> dict[str, object]:
    keys: dict[str, object] = {"rope_theta": rope.rope_theta, "rope_type": rope.rope_type,
                               **rope.scaling}
    return {**keys, "original_max_position_embeddings": rope.original_len} if rope.scaling else keys


def name_problems(source: DeltaSource, config: ModelConfig,
                  infos: Mapping[str, TensorInfo]) -> list[str]:
    """Parameters of a delta that miss their partner in the target, one line each."""
    lines = []
    for name in sorted(source.names):
        shape = source.shape(name)
        what = f"module {name.removesuffix('.weight')}" if name in source.lora_names else name
        if name == HEAD_NAME and config.tie_word_embeddings:
            lines.append(f"{what} is adapted, but the target ties {HEAD_NAME} to its embedding")
        elif name not in infos:
            lines.append(f"{what} is adapted, but the target holds no {name}")
        elif infos[name].shape != shape and not _same_but_rows(name, shape, infos[name].shape):
            lines.append(f"{what} is adapted at shape {list(shape)}, but the target's is "
                         f"{list(infos[name].shape)}")
    return lines


def dtype_problems(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Tensors of the target that hold no floating-point numbers, one line each."""
    return [f"tensor {name} is {info.dtype} in the target, not one of "
            f"{', '.join(sorted(FLOAT_DTYPES))}"
            for name, info in infos.items() if info.dtype not in FLOAT_DTYPES]
