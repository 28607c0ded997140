"""What is known of the inputs of a recipe: sizes, and shapes of models; no weights are read."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from extend.capacity import ModelShape, model_shape
from extend.errors import CheckpointError, CompatibilityError
from extend.inputs import as_hub_input
from extend.model_config import ModelConfig, parse_config, read_json
from extend.options import input_paths
from extend.recipe import Recipe, Stage
from extend.recipe_plan.hub import HubFacts, look_at_hub
from extend.recipe_plan.known import known_config

_VALUE_BYTES = {"float32": 4, "float64": 8}  # the others have 2
MODEL_FIELDS = ("model", "base", "tuned", "target", "adapter", "merged", "reference", "rope_from",
                "file")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """An input or output of a stage.

    Attributes:
        num_bytes: on disk; None: not known.
        shape: of a checkpoint, or of the model that an adapter belongs to; None: not known.
        value_bytes: of a stored weight.
        embeddings_kept: whether the embeddings are surely those of the model it was made from.
        rank: of an adapter.
        where: "here", "stage" (an earlier one makes it), "hub" or "missing".
        download_bytes: that the Hub has and this machine has not; None: not known.
        source: where the shape is from, unless it is the model's own config.
        problem: why nothing can be said of it, or it cannot be had.
        path: where it lies on this machine; None where it does not yet.
    """

    num_bytes: int | None = None
    shape: ModelShape | None = None
    value_bytes: int = 2
    embeddings_kept: bool = False
    rank: int | None = None
    where: str = "stage"
    download_bytes: int | None = 0
    source: str = ""
    problem: str = ""
    path: Path | None = None


NOTHING = Facts()


def shape_unknown(value: str, facts: Facts) -> str:
    """What to do where the shape of an input is needed and not known."""
    if facts.where == "stage":
        return f"not counted: the shape of what {value} writes is not known"
    return f"not counted: the shape of {value} is not known; give --config {value}=CONFIG.JSON"


def look_up_inputs(recipe: Recipe, configs: Mapping[str, Path | str]) -> dict[str, Facts]:
    """What the recipe reads from outside -> what is known of it.

    Models whose own config is not here have the shape of others that the same stages take for
    models of one kind: base and tuned, adapter and target.

    Args:
        configs: input, as the recipe calls it -> config.json.

    Raises:
        CheckpointError: a config that was given cannot be read.
        CompatibilityError: it is that of a model that cannot be treated.
    """
    names = {stage.name for stage in recipe.stages}
    values = dict.fromkeys(value for stage in recipe.stages
                           for _, value in input_paths(stage.options) if value not in names)
    found = {value: _look_up(value, recipe.path.parent, configs.get(value)) for value in values}
    kin = _kin(recipe.stages)
    for value, facts in found.items():
        if facts.shape is None and value in kin:
            alike = next((other for other in kin[value] if found.get(other, NOTHING).shape), None)
            if alike is not None:
                found[value] = _like(facts, found[alike], alike)
    return found


def _like(facts: Facts, other: Facts, name: str) -> Facts:
    shape, value_bytes = other.shape, other.value_bytes
    size = facts.num_bytes or (shape.parameters * value_bytes if shape else None)
    download = size if facts.where == "hub" and facts.download_bytes is None else \
        facts.download_bytes
    return replace(facts, shape=shape, value_bytes=value_bytes, num_bytes=size,
                   download_bytes=download, source=f"taken to be like {name}")


def _kin(stages: Iterable[Stage]) -> dict[str, list[str]]:
    """Value -> all that stages take for models of one shape, outputs of stages among them."""
    groups: dict[str, list[str]] = {}
    for stage in stages:
        values = [value for place, value in input_paths(stage.options)
                  if place[0] in MODEL_FIELDS]
        if stage.kind not in ("eval", "report"):
            values.append(stage.name)
        merged = list(dict.fromkeys(other for value in values
                                    for other in groups.get(value, [value])))
        for value in merged:
            groups[value] = merged
    return groups


def _look_up(value: str, directory: Path, config: Path | str | None) -> Facts:
    path = directory / value
    wanted = as_hub_input(value, directory)
    if wanted is not None:
        facts = _from_hub(value, look_at_hub(wanted))
    elif path.exists():
        facts = look_at(path)
    else:
        facts = _presumed(value, "missing", f"{os.path.normpath(path)} is not there")
    if config is None:
        return facts
    shape, value_bytes = _read_shape(Path(config))
    return replace(facts, shape=shape, value_bytes=value_bytes, source=str(config),
                   num_bytes=facts.num_bytes or shape.parameters * value_bytes)


def look_at(path: Path) -> Facts:
    """What is there: a checkpoint, an adapter, text, results."""
    size = path.stat().st_size if path.is_file() else sum(
        os.path.getsize(os.path.join(folder, name)) for folder, _, files in os.walk(path)
        for name in files)
    facts = Facts(num_bytes=size, where="here", path=path.resolve())
    if not (path / "config.json").is_file():
        return facts
    try:
        shape, value_bytes = _read_shape(path)
    except (CheckpointError, CompatibilityError) as error:
        return replace(facts, problem=str(error))
    return replace(facts, shape=shape, value_bytes=value_bytes)


def _from_hub(value: str, hub: HubFacts) -> Facts:
    if hub.path is not None:
        return replace(look_at(hub.path), where="hub")
    if hub.config is None:
        facts = _presumed(value, "hub", hub.problem)
        size = hub.num_bytes or facts.num_bytes
        return replace(facts, num_bytes=size, download_bytes=size if hub.download_bytes is None
                       else hub.download_bytes)
    facts = Facts(num_bytes=hub.num_bytes, where="hub", download_bytes=hub.download_bytes)
    try:
        config = parse_config(hub.config, Path(value) / "config.json")
        return replace(facts, shape=model_shape(config), value_bytes=_value_bytes(config))
    except (CheckpointError, CompatibilityError) as error:
        return replace(facts, problem=str(error))


def _presumed(value: str, where: str, problem: str) -> Facts:
    """By the name: the shape of a well-known model, stored in bfloat16."""
    known = known_config(value)
    if known is None:
        return Facts(where=where, problem=problem,
                     download_bytes=None if where == "hub" else 0)
    shape = model_shape(parse_config(known[1], Path(known[0]) / "config.json"))
    return Facts(num_bytes=2 * shape.parameters, shape=shape, where=where, problem=problem,
                 source=f"its config is not here; its shape is that of {known[0]}")


def _read_shape(path: Path) -> tuple[ModelShape, int]:
    file = path if path.is_file() else path / "config.json"
    config = parse_config(read_json(file), file)
    return model_shape(config), _value_bytes(config)


def _value_bytes(config: ModelConfig) -> int:
    stored = config.raw.get("dtype") or config.raw.get("torch_dtype")
    return _VALUE_BYTES.get(str(stored), 2)
