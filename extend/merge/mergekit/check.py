"""The gate before mergekit runs: everything that headers and configs tell, all problems at once.

mergekit crops embeddings, skips tensors of another shape and leaves out what its own definition of
an architecture does not list, with a warning at most. All of these are refused here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from extend.adapter_format.peft_files import Adapter
from extend.adapter_format.sidecar import ModelIdentity, RopeChange, parameter_infos, tied_copy
from extend.checkpoint import Checkpoint, TensorInfo
from extend.errors import CompatibilityError, ExtendError, RecipeError
from extend.merge.compat import (
    context_change,
    dtype_problems,
    fit_problems,
    layer_type_problems,
    rope_problems,
)
from extend.merge.mergekit.methods import (
    BASE,
    PREFIX,
    TARGET,
    MergekitMethod,
    Settings,
    load_method,
    long_roles,
    read_settings,
)
from extend.merge.preview import announce, check_weight, out_dtype_name
from extend.model_config import ModelConfig, read_config

_T = TypeVar("_T")
_MAX_LISTED = 4


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to merge; the fields are the arguments of `extend.merge.merge`.

    Attributes:
        weights: one for each adapter, then one for `tuned`.
    """

    method: str
    target: Path
    adapters: tuple[Path, ...] = ()
    tuned: Path | None = None
    base: Path | None = None
    weights: tuple[float, ...] = (1.0,)
    options: Mapping[str, Any] = field(default_factory=dict)
    sidecar: bool = True
    dtype: str | None = None
    rope_from: Path | None = None

    @property
    def longs(self) -> dict[str, Path]:
        """Role -> the adapter or checkpoint that the long model comes from."""
        given = [*self.adapters, *([self.tuned] if self.tuned is not None else [])]
        return dict(zip(long_roles(len(given)), given, strict=True))


@dataclass(frozen=True)
class Model:
    """A checkpoint on disk, opened but not read."""

    config: ModelConfig
    files: Checkpoint
    infos: dict[str, TensorInfo]

    @classmethod
    def open(cls, directory: Path) -> "Model":
        config, files = read_config(directory), Checkpoint(directory)
        return cls(config, files, parameter_infos(config, files, headers_only=True))


@dataclass(frozen=True)
class Checked:
    """A merge that nothing stands against.

    Attributes:
        change: RoPE and lengths to write.
        written: the tensors to write, in the target's order.
    """

    method: MergekitMethod
    settings: Settings
    target: Model
    change: RopeChange
    written: list[TensorInfo]


class Problems(list[ExtendError]):
    """Errors that were met, so that one does not hide another."""

    def attempt(self, step: Callable[[], _T]) -> _T | None:
        """What `step` returns; None when it raises an ExtendError, which is kept."""
        try:
            return step()
        except ExtendError as error:
            self.append(error)
            return None

    def add(self, lines: Sequence[str], where: str) -> None:
        """Keep each line as a problem of models that do not fit together."""
        self.extend(CompatibilityError(f"{where}: {line}") for line in lines)


def check(request: Request, problems: Problems) -> Checked | None:
    """Check a merge by mergekit from headers and configs; None when something stands against it."""
    method, settings = _check_options(request, problems)
    paths = {TARGET: request.target, BASE: request.base, "tuned": request.tuned}
    models = {role: problems.attempt(lambda path=path: Model.open(path))
              for role, path in paths.items() if path is not None}
    models = {role: model for role, model in models.items() if model is not None}
    adapters = [problems.attempt(lambda path=path: Adapter(path)) for path in request.adapters]
    out_dtype = problems.attempt(lambda: out_dtype_name(request.dtype))
    if TARGET not in models:
        return None
    target = models[TARGET]
    _check_models(request, models, problems)
    _check_adapters([a for a in adapters if a is not None], models.get(BASE), problems)
    change = problems.attempt(lambda: _rope_change(request, models, adapters)) \
        if None not in adapters else None
    if change is not None:
        problems.add(layer_type_problems(change, target.config), str(request.target))
    if problems or method is None or settings is None or change is None:
        return None
    problems.attempt(lambda: _check_architecture(request, target))
    head = tied_copy(target.config, target.files, headers_only=True)
    written = announce(target.files, target.infos, out_dtype, head)
    return None if problems else Checked(method, settings, target, change, written)


def _check_options(request: Request,
                   problems: Problems) -> tuple[MergekitMethod | None, Settings | None]:
    for weight in request.weights:
        problems.attempt(lambda weight=weight: check_weight(weight))
    if not request.longs:
        problems.append(RecipeError(f"{request.method}: no long model; give --adapter, or --tuned"))
    elif len(request.weights) != len(request.longs):
        problems.append(RecipeError(f"{len(request.weights)} weights for {len(request.longs)} long "
                                    "models; give one for each, adapters first"))
    if request.adapters and request.base is None:
        problems.append(RecipeError(f"{request.method}: mergekit merges whole models, and an "
                                    "adapter makes one only with its base; give --base"))
    method = problems.attempt(lambda: load_method(request.method))
    if problems or method is None:
        return method, None
    problems.attempt(lambda: _check_count(request, method))
    return method, problems.attempt(lambda: read_settings(
        method, request.options, [*request.longs], request.weights))


def roles(request: Request, method: MergekitMethod) -> tuple[list[str], str | None]:
    """Which models mergekit is given, and which of them is its base.

    A pairwise method has no third model: it blends from the target to the long one.
    """
    models = [TARGET, *request.longs]
    if method.pairwise:
        return models, TARGET
    if method.base == "forbidden" or request.base is None:
        return models, None
    return models, BASE


def _check_count(request: Request, method: MergekitMethod) -> None:
    """Let mergekit judge the number of models, and that no two of them are one."""
    models, base = roles(request, method)
    if base is None and method.base == "required":
        raise RecipeError(f"{request.method} merges what models changed in their base; give --base")
    # An adapter becomes a checkpoint of its own, so that its role is as good as a path.
    paths = {TARGET: request.target, BASE: request.base, **request.longs,
             **dict(zip(request.longs, map(Path, [*request.longs][:len(request.adapters)])))}
    ids = [str(paths[role].resolve()) for role in models]
    base_id = None if base is None else str(paths[base].resolve())
    extra = [base_id] if base_id not in (None, *ids) else []
    try:
        method.registered.validate_inputs([*ids, *extra], base_id)
    except ValueError as error:
        given = ", ".join(dict.fromkeys((*models, *([base] if base else []))))
        raise RecipeError(f"{request.method} of {given}: {error}") from None


def _check_models(request: Request, models: Mapping[str, Model], problems: Problems) -> None:
    target = models[TARGET]
    mine = ModelIdentity.of(target.config, target.infos)
    for role, model in models.items():
        where = str(model.files.directory)
        problems.add(dtype_problems(model.infos), where)
        if role == TARGET:
            continue
        theirs = ModelIdentity.of(model.config, model.infos)
        if theirs.vocab_size != mine.vocab_size:
            problems.add([
                f"vocab_size is {theirs.vocab_size} in {role} but {mine.vocab_size} in the target "
                f"{request.target}; mergekit pairs the rows of embeddings by their number, so "
                f"{request.method} needs one vocabulary. Methods without {PREFIX} in their name "
                "pair them by token"], where)
        else:
            problems.add(theirs.differences(mine, role, f"the target {request.target}"), where)
    if BASE in models:
        problems.add(rope_problems(models[BASE].config.rope, target.config.rope),
                     f"{request.base} and {request.target}")


def _check_adapters(adapters: Sequence[Adapter], base: Model | None, problems: Problems) -> None:
    if base is not None:
        for adapter in adapters:
            problems.add(fit_problems(adapter, base.config, base.infos),
                         f"{adapter.directory} on {base.files.directory}")


def _rope_change(request: Request, models: Mapping[str, Model],
                 adapters: Sequence[Adapter]) -> RopeChange | None:
    """The change that all long models made, None without any; two RoPEs have none between them."""
    if request.rope_from is not None and all(a.sidecar is not None for a in adapters):
        raise RecipeError(f"rope_from is {request.rope_from}, but every long model says which RoPE "
                          "it has; leave rope_from out")
    target = models[TARGET].config
    changes = {str(a.directory): context_change(
        a, target, request.rope_from if a.sidecar is None else None) for a in adapters}
    if "tuned" in models:
        changes[str(request.tuned)] = RopeChange.between(target, models["tuned"].config)
    if not changes:
        return None
    (first, change), *others = changes.items()
    for label, other in others:
        for key in ("after", "max_position_embeddings_after"):
            if getattr(other, key) != getattr(change, key):
                raise CompatibilityError(
                    f"{first} and {label} were made long with different RoPEs: {key} is "
                    f"{getattr(change, key)} and {getattr(other, key)}; a merged model has one, "
                    "merge models of one RoPE")
    return change


def _check_architecture(request: Request, target: Model) -> None:
    """Refuse a model of which mergekit would write only a part, or under other names.

    Raises:
        CompatibilityError: mergekit's definition of the architecture lacks a parameter, or there
            is none and it cannot be inferred.
    """
    from mergekit.architecture import get_architecture_info
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    paths = [p for p in (request.target, request.base, request.tuned) if p is not None]
    config = MergeConfiguration.model_validate({
        "merge_method": "linear", "models": [{"model": reference(path)} for path in paths]})
    try:
        known = get_architecture_info(config, MergeOptions())
        weights = known.all_weights(
            ModelReference.model_validate(reference(request.target)).config())
    except Exception as error:  # whatever mergekit or transformers raises for a model it lacks
        raise CompatibilityError(f"{request.target}: mergekit does not know the architecture "
                                 f"{target.config.architecture} ({error}); use a method without "
                                 f"{PREFIX} in its name") from error
    missing = sorted(set(target.infos) - {weight.name for weight in weights})
    if missing:
        listed = ", ".join(missing[:_MAX_LISTED]) + (", ..." if len(missing) > _MAX_LISTED else "")
        raise CompatibilityError(
            f"{request.target}: mergekit would not write {len(missing)} of {len(target.infos)} "
            f"tensors, which its definition of {target.config.architecture} does not list "
            f"({listed}); use a method without {PREFIX} in its name")


def reference(path: Path) -> dict[str, Any]:
    """A model in mergekit's configuration.

    Written out, because mergekit splits text at `+` and `@`, and an absolute path, because it asks
    a hub for what it does not find.
    """
    return {"model": {"path": str(Path(path).absolute())}}
