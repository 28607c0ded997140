"""Measure a target against its base, or against the sample of it that an adapter keeps."""

from pathlib import Path

from extend.adapter_format.peft_files import Adapter
from extend.delta.conflict import measure_conflict
from extend.delta.lineage import Lineage, compare
from extend.delta.sample import SAMPLE_NAME, compare_with_sample, read_sample
from extend.delta.sources import AdapterDelta, BaseModel, DeltaSource, ModelDelta
from extend.errors import CheckpointError, RecipeError
from extend.inputs import takes_models
from extend.lineage.plot import draw_lineage
from extend.lineage.report import Report
from extend.manifest import Manifest
from extend.output import atomic_directory, write_json

LINEAGE_NAME = "lineage.json"
PLOT_NAME = "lineage.png"


@takes_models("target", "base", "tuned", "adapter")
def lineage(target: Path | str, base: Path | str | None = None, *, tuned: Path | str | None = None,
            adapter: Path | str | None = None, rank: int = 16, seed: int = 0) -> Report:
    """Say whether a target is a fine-tune of a base, and whether a long delta fits it.

    With a base, both models are read once, in blocks. Without one, the few values of it that an
    adapter keeps are compared, in about a second, and all numbers come with 95 % intervals.

    Args:
        target: checkpoint directory.
        base: checkpoint directory; None takes the sample of `adapter`.
        tuned: the long model, whose delta is then measured against target - base.
        adapter: the same delta as an adapter; give one of the two.
        rank: dimension of the leading subspaces of the sibling's delta.
        seed: of the random sketches behind them.

    Raises:
        RecipeError: both or neither of what the options need, or a rank below 1.
        CheckpointError: a file is missing or damaged, or holds infinite or NaN values.
        CompatibilityError: the models cannot be compared.
    """
    if tuned is not None and adapter is not None:
        raise RecipeError(f"lineage: tuned ({tuned}) and adapter ({adapter}) both give the long "
                          "delta; leave one of them out")
    if rank < 1:
        raise RecipeError(f"lineage: rank is {rank}; give at least 1")
    model = BaseModel.open(target)
    inputs = {role: Path(path) for role, path in (
        ("base", base), ("target", target), ("tuned", tuned), ("adapter", adapter)) if path}
    options = {"rank": rank, "seed": seed}
    if base is None:
        return Report(inputs, options, _from_sample(adapter, model))
    start = BaseModel.open(base)
    found = compare(start.files, start.infos, model.files, model.infos)
    source = _source(start, tuned, adapter)
    conflict = None if source is None else measure_conflict(
        found, source, start.files, model.files, rank=rank, seed=seed)
    return Report(inputs, options, found, conflict)


def _from_sample(adapter: Path | str | None, target: BaseModel) -> Lineage:
    if adapter is None:
        raise RecipeError("lineage: base is missing; give it, or an adapter of `extend extract`, "
                          "which keeps a sample of it")
    sample = read_sample(Path(adapter))
    if sample is None:
        raise CheckpointError(f"{adapter}: holds no {SAMPLE_NAME}, the sample of its base; give "
                              "the base itself (--base DIR), or extract the adapter again")
    return compare_with_sample(sample, target.files, target.infos)


def _source(base: BaseModel, tuned: Path | str | None,
            adapter: Path | str | None) -> DeltaSource | None:
    if adapter is not None:
        return AdapterDelta(Adapter(adapter), base=base)
    return None if tuned is None else ModelDelta.open(base.files.directory, tuned)


def write_lineage(report: Report, out: Path | str, *, overwrite: bool = False) -> Path:
    """Write lineage.json, lineage.png and a manifest into the directory `out` and return it.

    Raises:
        CheckpointError: `out` exists or cannot be written.
        RecipeError: `out` holds an input, which `overwrite` would destroy.
    """
    with atomic_directory(out, overwrite=overwrite, inputs=report.inputs) as partial:
        manifest = Manifest("lineage", report.inputs, report.options)
        write_json(partial / LINEAGE_NAME, report.to_json())
        draw_lineage(report, partial / PLOT_NAME)
        manifest.write(partial, **report.lineage.summary())
    return Path(out)
