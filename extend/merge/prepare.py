"""Everything that a merge and its dry run look at before a weight is read."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from extend.adapter_format.peft_files import Adapter, stored_dtype
from extend.adapter_format.sidecar import HEAD_NAME, RopeChange, parameter_infos, tied_copy
from extend.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo, dtype_name
from extend.delta.pair import is_vocabulary
from extend.delta.sources import AdapterDelta, BaseModel, DeltaSource, ModelDelta
from extend.errors import CompatibilityError, ExtendError
from extend.merge.advice import advise
from extend.merge.compat import context_change, dtype_problems, fit_problems, identity_problems
from extend.merge.methods import Method
from extend.merge.request import Request
from extend.merge.vocabulary import VocabularyMap, map_vocabulary
from extend.merge.weights import LayerWeights
from extend.model_config import ModelConfig, read_config
from extend.tokenizer import read_vocabulary

log = logging.getLogger(__name__)

_T = TypeVar("_T")
Attempt = Callable[[Callable[[], _T]], _T | None]


@dataclass(frozen=True)
class Term:
    """One delta of the sum.

    Attributes:
        vocabulary: how its embedding rows are mapped; None where that is row by row.
    """

    source: DeltaSource
    weight: float
    vocabulary: VocabularyMap | None = None


@dataclass
class Plan:
    """What is known of a merge; of a broken one, what could still be found out.

    Attributes:
        infos: the target's parameters.
        written: the tensors of the output, in the target's order.
        head: the embedding that a stored `lm_head.weight` repeats, or None.
        base: the model that the target was tuned from, if given.
        base_vocabulary: how its embedding rows are mapped; None where that is row by row.
        change: RoPE and lengths to write.
    """

    terms: list[Term] = field(default_factory=list)
    config: ModelConfig | None = None
    files: Checkpoint | None = None
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    written: list[TensorInfo] = field(default_factory=list)
    head: str | None = None
    base: BaseModel | None = None
    base_vocabulary: VocabularyMap | None = None
    method: Method = field(default_factory=Method)
    layer_weights: LayerWeights = field(default_factory=lambda: LayerWeights(None))
    change: RopeChange | None = None

    def weight_of(self, term: Term, name: str) -> float:
        """What the delta of a parameter is multiplied by; 0 where a source does not change it."""
        if not term.weight or name not in term.source.names:
            return 0.0
        return term.weight * self.layer_weights.weight_of(name, self.config.num_layers)

    def changed(self) -> dict[str, set[str]]:
        """Names that get a LoRA product, a delta beside one, and the difference of two models."""
        found: dict[str, set[str]] = {"modules": set(), "sidecar": set(), "models": set()}
        for term in self.terms:
            for name in term.source.names if self.config else ():
                if self.weight_of(term, name):
                    kind = "modules" if name in term.source.lora_names else (
                        "models" if isinstance(term.source, ModelDelta) else "sidecar")
                    found[kind].add(name)
        return found

    def left_out(self) -> int:
        """How many deltas lie beside LoRA factors but are not added."""
        added = self.changed()["sidecar"]
        return sum(len(term.source.beside - added) for term in self.terms
                   if isinstance(term.source, AdapterDelta))

    def vocabulary_lines(self) -> list[str]:
        """How embedding rows are mapped, one line for each delta that needs it."""
        return [f"{term.source.label}: {term.vocabulary.text()}" for term in self.terms
                if term.vocabulary is not None]

    def dropped_buffers(self) -> list[str]:
        """Tensors of the target that are not written."""
        known = self.files.infos if self.files and self.written else ()
        return sorted(set(known) - {info.name for info in self.written})


class Problems:
    """What stands against a merge: raised at once, or collected for a dry run.

    Attributes:
        lines: what was collected, one line each.
    """

    def __init__(self, *, collect: bool):
        self.collect, self.lines = collect, []

    def attempt(self, step: Callable[[], _T]) -> _T | None:
        """What a step returns; None where its error was collected."""
        try:
            return step()
        except ExtendError as error:
            if not self.collect:
                raise
            self.lines.append(str(error))
            return None

    def add(self, problems: Sequence[str], what: str, target: Path, advice: str) -> None:
        """Misfits of something with the target, all in one error where they are not collected."""
        if problems and not self.collect:
            raise CompatibilityError(f"{what} does not fit {target}: {'; '.join(problems)}. "
                                     f"{advice}")
        self.lines += [f"{what} on {target}: {line}" for line in problems]


def prepare(request: Request, problems: Problems) -> Plan:
    """Open everything and check that it fits together.

    Where problems are collected only headers are read, and the config is believed where it ties
    the head.
    """
    plan = Plan()
    attempt = problems.attempt
    attempt(request.check)
    plan.method = attempt(request.make_method) or Method()
    plan.layer_weights = attempt(lambda: LayerWeights(request.layer_weights)) or LayerWeights(None)
    if request.base is not None:
        plan.base = attempt(lambda: BaseModel.open(request.base, headers_only=problems.collect))
    sources = _open_sources(request, plan.base, attempt)
    _open_target(request, plan, problems)
    if plan.config is not None:
        plan.change = attempt(lambda: context_change([source for source, _ in sources],
                                                     plan.config, request.rope_from))
    _check_base(request, plan, problems)
    plan.terms = [_fit(source, weight, request, plan, problems) for source, weight in sources]
    problems.add(dtype_problems(plan.infos), "the merge", request.target,
                 "Dequantize the model first and give that checkpoint")
    names = {name for term in plan.terms for name in term.source.names}
    if names and len(plan.terms) == len(request.weights):
        attempt(lambda: plan.layer_weights.check(names))
    for line in advise(plan.change, request.method, request.weights):
        log.warning("%s", line)
    return plan


def _open_target(request: Request, plan: Plan, problems: Problems) -> None:
    attempt, headers_only = problems.attempt, problems.collect
    dtype = attempt(lambda: out_dtype_name(request.dtype))
    plan.config = attempt(lambda: read_config(request.target))
    plan.files = attempt(lambda: Checkpoint(request.target))
    if plan.files is None:
        return
    plan.infos = plan.files.infos
    if plan.config is not None:
        plan.infos = parameter_infos(plan.config, plan.files, headers_only=headers_only)
        plan.head = tied_copy(plan.config, plan.files, headers_only=headers_only)
        plan.written = announce(plan.files, plan.infos, dtype, plan.head)


def _check_base(request: Request, plan: Plan, problems: Problems) -> None:
    if plan.base is None or plan.config is None or not plan.infos:
        return
    misfits = identity_problems(plan.base.identity, plan.config, plan.infos, "the base")
    problems.add(misfits, f"the base {request.base}", request.target,
                 "Give the model that the target was tuned from")
    if not misfits and plan.method.needs_base:
        plan.base_vocabulary = problems.attempt(lambda: _map(
            plan, request, plan.base.vocabulary, plan.base.identity.shapes, str(request.base)))


def _open_sources(request: Request, base: BaseModel | None,
                  attempt: Attempt) -> list[tuple[DeltaSource, float]]:
    sources: list[tuple[DeltaSource, float]] = []
    for path, weight in zip(request.adapters, request.weights, strict=False):
        adapter = attempt(lambda path=path: AdapterDelta(Adapter(path), request.sidecar, base))
        if adapter is not None:
            sources.append((adapter, weight))
    if request.tuned is not None and request.base is not None:
        delta = attempt(lambda: ModelDelta.open(request.base, request.tuned))
        if delta is not None:
            sources.append((delta, request.weights[-1]))
    return sources


def _fit(source: DeltaSource, weight: float, request: Request, plan: Plan,
         problems: Problems) -> Term:
    """The term of a source, once it fits the target."""
    if plan.config is None or not plan.infos:
        return Term(source, weight)
    misfits = fit_problems(source, plan.config, plan.infos)
    problems.add(misfits, source.label, request.target,
                 "Merge it into a fine-tune of its own base")
    changed = [name for name in source.names if is_vocabulary(name)]
    if misfits or not changed or not weight:
        return Term(source, weight)
    return Term(source, weight, problems.attempt(lambda: _map(
        plan, request, source.vocabulary, {name: source.shape(name) for name in changed},
        source.label)))


def _map(plan: Plan, request: Request, tokens: Mapping[str, int] | None,
         shapes: Mapping[str, tuple[int, ...]], label: str) -> VocabularyMap | None:
    """How the embedding rows of another model go to the target's; None where row by row."""
    name = next((n for n in shapes if is_vocabulary(n) and n in plan.infos), None)
    if name is None:
        return None
    found = map_vocabulary(tokens, shapes[name][0], read_vocabulary(request.target),
                           plan.infos[name].shape[0], label=label,
                           target_label=str(request.target))
    return None if found.is_identity and not found.renamed else found


def out_dtype_name(dtype: str | None) -> str | None:
    """The safetensors name of the output's dtype; None keeps each tensor's own."""
    return None if dtype is None else dtype_name(stored_dtype(dtype))


def announce(files: Checkpoint, infos: Mapping[str, TensorInfo], out_dtype: str | None,
             head: str | None) -> list[TensorInfo]:
    """The tensors to write, in the target's order.

    Args:
        infos: the target's parameters; what is not among them (derived buffers) is left out.
        out_dtype: safetensors name for floating-point tensors, or None.
        head: the embedding that a stored `lm_head.weight` repeats, or None.
    """
    kept = [files.infos[name] for name in files.infos
            if name in infos or (name == HEAD_NAME and head)]
    return [info if out_dtype is None or info.dtype not in FLOAT_DTYPES
            else info._replace(dtype=out_dtype) for info in kept]
