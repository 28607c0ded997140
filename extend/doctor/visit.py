"""Examine a directory, and write its portable form when asked to."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from extend.doctor.adapters import (
    diagnose_serving,
    fix_adapter,
    is_adapter,
    without_sidecar,
)
from extend.doctor.checks import CHECKS
from extend.doctor.decide import Choices, Decision, decide
from extend.doctor.diagnosis import Diagnosis
from extend.doctor.files import Patient, examine
from extend.doctor.findings import (
    ERROR,
    NOTE,
    WARNING,
    Finding,
    agreement,
    compare,
    same_reading,
)
from extend.doctor.fix import list_changes, portable_form, write_copy, write_in_place
from extend.doctor.readers import READERS, read_with
from extend.doctor.reading import ModelFiles, Reading
from extend.errors import CompatibilityError, RecipeError
from extend.inputs import as_hub_input, local_path
from extend.registry import lookup

_ORDER = (ERROR, WARNING, NOTE)
_KEEP = ("rope_scaling", "rope_parameters")


def doctor(directory: Path | str, *, fix: bool = False, out: Path | str | None = None,
           overwrite: bool = False, readers: Sequence[str] | None = None,
           theta: float | None = None, max_length: int | None = None,
           original_length: int | None = None, rope_type: str | None = None,
           keep: str | None = None) -> Diagnosis:
    """Read a checkpoint as each engine reads it, and compare.

    Args:
        directory: a checkpoint (weights are optional), or a LoRA adapter, whose files are also
            judged by the rules of serving engines; or a repository of the Hub with one.
        fix: write the portable form of its configuration; of an adapter, the form that every
            engine serves, which needs `out`.
        out: where to write it, with the rest of the directory; None: in place, and the files as
            they were stay beside the new ones.
        overwrite: replace `out` if it exists.
        readers: names in `READERS` of the engines to compare; None: all.
        theta, max_length, original_length, rope_type, keep: what is right where the files
            contradict themselves. Lengths are tokens; `keep` is rope_scaling or rope_parameters.

    Returns:
        The diagnosis; after a fix, that of what was written. `ok` says whether all agree.

    Raises:
        CheckpointError: files are missing, damaged or hold values of the wrong kind, or `out`
            cannot be written.
        CompatibilityError: a model whose RoPE these keys do not describe; or, with `fix`,
            something is left to decide, or no form of the configuration makes all readers agree.
        RecipeError: a reader or value that is not accepted.
    """
    choices = _check_choices(Choices(theta, max_length, original_length, rope_type, keep))
    names = list(READERS) if readers is None else list(dict.fromkeys(readers))
    for name in names:
        lookup(READERS, name, "readers")
    if out is not None and not fix:
        raise RecipeError("out is for what --fix writes; give --fix as well")
    if as_hub_input(directory) and fix and out is None:
        raise RecipeError(f"{directory} is on the Hub, so it cannot be changed in place; give out, "
                          "the directory to write (--out)")
    directory = local_path(directory, weights=fix)
    if is_adapter(Path(directory)):
        found = without_sidecar(Path(directory)) or _diagnose(examine(directory), choices, names)[0]
        found = diagnose_serving(found, names)
        return fix_adapter(found, out, names, overwrite=overwrite) if fix else found
    patient = examine(directory)
    found, files = _diagnose(patient, choices, names)
    if not fix:
        return found
    return _fix(patient, found, files, choices, names, out, overwrite)


def _check_choices(choices: Choices) -> Choices:
    if choices.theta is not None and not (
            isinstance(choices.theta, int | float) and 1 < choices.theta < math.inf):
        raise RecipeError(f"theta must be a finite number above 1, not {choices.theta!r}")
    for name in ("max_length", "original_length"):
        value = getattr(choices, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise RecipeError(f"{name} must be a number of tokens, not {value!r}")
    if choices.keep not in (None, *_KEEP):
        raise RecipeError(f"keep must be {' or '.join(_KEEP)}, not {choices.keep!r}")
    return choices


def _diagnose(patient: Patient, choices: Choices,
              names: Sequence[str]) -> tuple[Diagnosis, ModelFiles | None]:
    """The diagnosis, and the portable files when nothing is left to decide."""
    decision = decide(patient.files, choices, patient.directory.resolve().name)
    files, changes, questions = None, {}, decision.questions
    if not questions:
        try:
            files = portable_form(patient.files, decision)
            changes = list_changes(patient.files, files)
        except CompatibilityError as error:
            questions = (f"there is no portable form: {error}",)
    readings = [read_with(name, patient.files) for name in names]
    after = [] if files is None else [read_with(name, files) for name in names]
    reference = _reference(patient.files, files, readings)
    findings = compare(readings, reference, after, changes)
    findings += _other_findings(patient, decision, reference, names)
    findings.sort(key=lambda finding: _ORDER.index(finding.severity))
    return Diagnosis(
        directory=patient.directory, architecture=_architecture(patient),
        readings=tuple(readings), agreeing=tuple(tuple(g) for g in agreement(readings)),
        findings=tuple(findings), questions=questions, changes=changes), files


def _reference(files: ModelFiles, portable: ModelFiles | None,
               readings: Sequence[Reading]) -> Reading:
    """What transformers 5 makes of the portable files, if there are any, or of those there are.

    Where one that reads the present files gets the same, its reading is returned: it names the
    keys as they are. Where transformers 5 refuses, another engine's reading stands in.
    """
    present = [reading for reading in (read_with("transformers-5", files), *readings)
               if reading.layers]
    if portable is None:
        return present[0] if present else readings[0]
    right = read_with("transformers-5", portable)
    return next((reading for reading in present if same_reading(reading, right)), right)


def _other_findings(patient: Patient, decision: Decision, reference: Reading,
                    names: Sequence[str]) -> list[Finding]:
    """What the checks find, about the engines that were asked for."""
    found = [finding for check in CHECKS for finding in check(patient, decision, reference)]
    kept = []
    for finding in found:
        readers = tuple(name for name in finding.readers if name in names)
        if readers or not finding.readers:
            kept.append(replace(finding, readers=readers))
    return kept


def _architecture(patient: Patient) -> str:
    config = patient.files.config
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else config.get("model_type")
    return f"{name or 'architecture not named'}{', an adapter' if patient.is_adapter else ''}"


def _fix(patient: Patient, found: Diagnosis, files: ModelFiles | None, choices: Choices,
         names: Sequence[str], out: Path | str | None, overwrite: bool) -> Diagnosis:
    where = patient.directory
    if files is None:
        asked = "; ".join(f"({i}) {text}" for i, text in enumerate(found.questions, start=1))
        raise CompatibilityError(f"{where}: nothing was written, because only you can decide: "
                                 f"{asked}")
    cured, _ = _diagnose(replace(patient, files=files), Choices(), names)
    if not cured.ok:
        left = "; ".join([f"{', '.join(f.readers) or 'all'} {f.message} ({f.remedy})"
                          for f in cured.errors] + list(cured.questions))
        raise CompatibilityError(
            f"{where}: nothing was written, because no form of the configuration makes all "
            f"readers agree: {left}. Leave engines that you do not use out with --readers")
    output: Path | None = None
    if out is not None:
        output = write_copy(patient, files, Path(out), overwrite=overwrite)
    elif found.changes:
        output = write_in_place(patient, files)
    return replace(cured, changes=found.changes, output=output)
