"""An adapter's files as serving engines take them, beside what its sidecar says of the RoPE."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from extend.adapter_format.peft_files import ADAPTER_CONFIG
from extend.adapter_format.serving import ServingVerdict, check_serving
from extend.adapter_format.serving_files import unserved
from extend.adapter_format.serving_form import write_servable
from extend.adapter_format.sidecar import SIDECAR_JSON, read_sidecar
from extend.doctor.diagnosis import Diagnosis
from extend.doctor.findings import ERROR, NOTE, WARNING, Finding
from extend.errors import CompatibilityError


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no checkpoint."""
    return (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file()


def diagnose_serving(found: Diagnosis, names: Sequence[str]) -> Diagnosis:
    """Add to an adapter's diagnosis what the engines in `names` make of its files.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    verdicts = tuple(v for v in check_serving(found.directory) if v.engine in names)
    findings = [*found.findings, *_findings(verdicts), *_unserved(found.directory, names)]
    order = (ERROR, WARNING, NOTE)
    findings.sort(key=lambda finding: order.index(finding.severity))
    return replace(found, findings=tuple(findings), serving=verdicts)


def without_sidecar(directory: Path) -> Diagnosis | None:
    """The beginning of a diagnosis of another program's adapter; None where there is a sidecar."""
    if read_sidecar(directory) is not None:
        return None
    return Diagnosis(
        directory=directory, architecture="a LoRA adapter", readings=(), agreeing=(),
        findings=(Finding(
            severity=NOTE, what="RoPE", message=f"no {SIDECAR_JSON}, so nothing says which RoPE "
            "and which length it belongs to", remedy="extract it again with `extend extract`, or "
            "give `extend merge` the long model with --rope-from"),))


def _findings(verdicts: Sequence[ServingVerdict]) -> list[Finding]:
    return [Finding(severity=ERROR if verdict.current else WARNING,
                    what=f"served by {verdict.engine}", readers=(verdict.engine,),
                    message=f"{problem.verdict if problem.verdict == 'refuses' else 'loads it'}: "
                            f"{problem.message}", remedy=problem.remedy)
            for verdict in verdicts for problem in verdict.problems]


def _unserved(directory: Path, names: Sequence[str]) -> list[Finding]:
    sidecar = read_sidecar(directory)
    lost = {} if sidecar is None else unserved(sidecar)
    if not lost.get("tensors"):
        return []
    return [Finding(
        severity=WARNING, what="sidecar",
        readers=tuple(n for n in ("vllm", "sglang", "llama.cpp") if n in names),
        message=f"{lost['tensors']} deltas in the sidecar reach no engine that serves the adapter; "
                f"the largest is that of {lost['largest']}",
        remedy="`extend merge` applies them; `extend extract --fold-norms` carries those of most "
               "norms inside the matrices")]


def fix_adapter(found: Diagnosis, out: Path | str | None, names: Sequence[str], *,
                overwrite: bool) -> Diagnosis:
    """Write the form that every engine serves; return its diagnosis.

    Raises:
        CompatibilityError: no `out`, an error that is not one of serving, or one that stays.
        CheckpointError: a file is missing or damaged, or `out` cannot be written.
    """
    where = found.directory
    if any(not f.what.startswith("served by") for f in found.errors) or found.questions:
        raise CompatibilityError(f"{where}: an adapter's record is not changed; extract it again "
                                 "from a long model that the doctor passes")
    if out is None:
        raise CompatibilityError(f"{where}: an adapter is not changed in place, its weights are "
                                 "written anew; give --out")
    path = write_servable(where, out, overwrite=overwrite)
    plain = replace(found, directory=path, findings=tuple(
        f for f in found.findings if not f.what.startswith("served by") and f.what != "sidecar"))
    return replace(diagnose_serving(plain, names), output=path)
