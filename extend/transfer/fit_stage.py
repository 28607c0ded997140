"""The stage `fit`: weights for `extend merge --layer-weights`, from prompts without answers."""

import logging
from pathlib import Path

import torch

from extend.adapter_format.peft_files import Adapter
from extend.adapter_format.sidecar import RopeChange
from extend.delta.sources import AdapterDelta, BaseModel, DeltaSource, ModelDelta
from extend.errors import CompatibilityError, RecipeError
from extend.loading import choose_device, choose_dtype, load_causal_lm
from extend.manifest import Manifest
from extend.model_config import ModelConfig, parse_config, read_config
from extend.options import local_options
from extend.output import atomic_directory, require_new, write_json
from extend.tokenizer import load_tokenizer
from extend.transfer.fit import Fit, fit_weights
from extend.transfer.learn import LearnSettings
from extend.transfer.plot import draw_course
from extend.transfer.setup import check_tokens, describe_inputs, make_lesson
from extend.transfer.sums import Delta, LowRank, check_fit
from extend.transfer_options import FitOptions

log = logging.getLogger(__name__)
WEIGHTS_NAME = "weights.json"
RESULTS_NAME = "fit.json"
PICTURE_NAME = "fit.png"
_ROLES = ("target", "adapter", "tuned", "base", "rope_from")


def fit(options: FitOptions, out: Path | str, *, overwrite: bool = False) -> Path:
    """Fit the weights of a merge and write them to `out`.

    The target is loaded twice: first as it is, to answer the prompts, then under the long RoPE
    with the deltas added while it computes.

    Args:
        options: whose delta, whose skill, and how.
        out: directory to create, for `weights.json`, `fit.json`, `fit.png` and the manifest.
        overwrite: replace `out` if it exists.

    Returns:
        `out`.

    Raises:
        RecipeError: an option out of range.
        DataError: prompts or text that are missing, malformed, too short or too long.
        CompatibilityError: a delta that does not fit the target, or no RoPE to go with it.
        CheckpointError: a file is missing or damaged, or `out` cannot be written.
        TrainingError: a loss that is not finite.
    """
    options = local_options(options)
    require_new(out, overwrite=overwrite)
    config, source = read_config(options.target), open_source(options)
    change = _context_change(options, source, config)
    context = change.max_position_embeddings_after
    tokenizer = load_tokenizer(options.target)
    if source.vocabulary is not None:
        check_tokens(source.vocabulary, tokenizer.get_vocab(), source.label, options.target)
    device = choose_device(options.device)
    dtype = choose_dtype("auto", device)
    inputs = describe_inputs(options, _ROLES)
    with atomic_directory(out, overwrite=overwrite, inputs=inputs) as partial:
        manifest = Manifest("fit", inputs, options.model_dump(mode="json"), options.seed)
        target = load_causal_lm(options.target, config, device=device, dtype=dtype)
        check_fit(target, {name: source.shape(name) for name in sorted(source.names)})
        lesson = make_lesson(target, tokenizer, options, context)
        del target
        long_config = parse_config(change.apply(config.raw), config.path)
        model = load_causal_lm(options.target, long_config, device=device, dtype=dtype)
        found = fit_weights(model, load_deltas(source, device), lesson, groups=options.groups,
                            settings=LearnSettings(steps=options.steps, lr=options.lr,
                                                   keep=options.keep))
        _write(partial, found)
        manifest.write(partial, start=found.start,
                       scores={name: s.to_json() for name, s in found.scores.items()})
    for name, scores in found.scores.items():
        log.info("%-6s %s", name, scores.text())
    log.info("merge with --layer-weights %s", Path(out) / WEIGHTS_NAME)
    return Path(out)


def open_source(options: FitOptions) -> DeltaSource:
    """The delta that the options name."""
    if options.adapter is None:
        return ModelDelta.open(options.base, options.tuned)
    base = BaseModel.open(options.base) if options.base is not None else None
    return AdapterDelta(Adapter(options.adapter), base=base)


def _context_change(options: FitOptions, source: DeltaSource, target: ModelConfig) -> RopeChange:
    if source.rope is not None:
        if options.rope_from is not None:
            raise RecipeError(f"rope_from is {options.rope_from}, but {source.label} knows its "
                              "RoPE; leave rope_from out")
        return source.rope
    if options.rope_from is None:
        raise CompatibilityError(f"{source.label}: does not say which RoPE it was trained with; "
                                 "give rope_from, the long model or anything with its config.json")
    return RopeChange.between(target, read_config(options.rope_from))


def load_deltas(source: DeltaSource, device: torch.device) -> dict[str, Delta]:
    """Every delta that is not zero, on the device; those of a LoRA as their factors."""
    modules = source.adapter.modules if isinstance(source, AdapterDelta) else {}
    deltas: dict[str, Delta] = {}
    for name in sorted(source.names):
        module = modules.get(name.removesuffix(".weight"))
        if module is not None:
            factors = source.adapter.read_factors(module.name)
            deltas[name] = LowRank(*(f.to(device) for f in factors), module.scaling)
        else:
            delta = source.read(name, str(device))(...)
            if bool(delta.any()):
                deltas[name] = delta
    if not deltas:
        raise CompatibilityError(f"{source.label}: every delta is zero, so there is nothing to "
                                 "give a weight to")
    return deltas


def _write(directory: Path, found: Fit) -> None:
    weights = {name: round(alpha, 6) for name, alpha in found.weights.items()}
    write_json(directory / WEIGHTS_NAME, {"schema": 1, "weights": weights, "default": 1.0})
    write_json(directory / RESULTS_NAME, {
        "schema": 1, "groups": found.groups, "start": found.start,
        "scores": {name: scores.to_json() for name, scores in found.scores.items()},
        "history": found.history})
    draw_course(directory / PICTURE_NAME,
                {f"from {start}": looks for start, looks in found.history.items()}, found.groups)
