"""The gate before a merge: does the adapter's base fit the target?"""

from collections.abc import Mapping
from pathlib import Path

from extend.adapter_format.peft_files import Adapter
from extend.adapter_format.sidecar import HEAD_NAME, ModelIdentity, RopeChange
from extend.checkpoint import FLOAT_DTYPES, TensorInfo
from extend.errors import CompatibilityError, RecipeError
from extend.model_config import ModelConfig, RopeSpec, read_config

_MAX_SHOWN = 4  # entries of a list


def context_change(adapter: Adapter, target: ModelConfig,
                   rope_from: Path | str | None) -> RopeChange:
    """The RoPE change to write: the sidecar's, or for a plain PEFT adapter that of a long model.

    Raises:
        RecipeError: both a sidecar and `rope_from`.
        CompatibilityError: neither of them, or a long model of another architecture.
    """
    if adapter.sidecar is not None:
        if rope_from is not None:
            raise RecipeError(f"rope_from is {rope_from}, but {adapter.directory} has a sidecar "
                              "that holds the RoPE; leave rope_from out")
        return adapter.sidecar.rope
    if rope_from is None:
        raise CompatibilityError(
            f"{adapter.directory}: a plain PEFT adapter does not say which RoPE it was trained "
            "with, and a long model with the wrong RoPE is broken; give --rope-from DIR, the long "
            "model or anything with its config.json")
    donor = read_config(rope_from)
    for field in ("architecture", "num_layers", "num_heads", "head_dim"):
        if getattr(donor, field) != getattr(target, field):
            raise CompatibilityError(
                f"{field} is {getattr(donor, field)} in {rope_from} but {getattr(target, field)} "
                f"in {target.path.parent}; take the RoPE from a long model of the target's own "
                "family")
    return RopeChange.between(target, donor)


def check_fit(adapter: Adapter, config: ModelConfig, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse a target on which the adapter would do nothing, or something else than on its base.

    Args:
        config: of the target.
        infos: the target's `parameter_infos`.

    Raises:
        CompatibilityError: all problems in one message, each with both values.
    """
    problems = fit_problems(adapter, config, infos)
    if problems:
        raise CompatibilityError(f"{adapter.directory} does not fit {config.path.parent}: "
                                 f"{'; '.join(problems)}. Merge it into a fine-tune of the "
                                 "adapter's own base")


def fit_problems(adapter: Adapter, config: ModelConfig,
                 infos: Mapping[str, TensorInfo]) -> list[str]:
    """What `check_fit` refuses, one line each; empty when the adapter fits."""
    problems: list[str] = []
    if adapter.sidecar is not None:
        target = ModelIdentity.of(config, infos)
        problems += adapter.sidecar.base.differences(target, "the adapter's base", "the target")
        problems += rope_problems(RopeSpec.from_json(adapter.sidecar.rope.before), config.rope)
        problems += layer_type_problems(adapter.sidecar.rope, config)
    if not problems:
        problems += module_problems(adapter, config, infos)
    return problems + dtype_problems(infos)


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


def module_problems(adapter: Adapter, config: ModelConfig,
                    infos: Mapping[str, TensorInfo]) -> list[str]:
    """Modules of the adapter that miss their weight in the target, one line each."""
    lines = []
    for module in adapter.modules.values():
        name, shape = f"{module.name}.weight", (module.out_features, module.in_features)
        if name == HEAD_NAME and config.tie_word_embeddings:
            lines.append(f"module {module.name} is adapted, but the target ties {HEAD_NAME} to its "
                         "embedding")
        elif name not in infos:
            lines.append(f"module {module.name} is adapted, but the target holds no {name}")
        elif infos[name].shape != shape:
            lines.append(f"module {module.name} is adapted at shape {list(shape)}, but the "
                         f"target's is {list(infos[name].shape)}")
    return lines


def dtype_problems(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Tensors of the target that hold no floating-point numbers, one line each."""
    return [f"tensor {name} is {info.dtype} in the target, not one of "
            f"{', '.join(sorted(FLOAT_DTYPES))}"
            for name, info in infos.items() if info.dtype not in FLOAT_DTYPES]
