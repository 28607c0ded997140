"""What a card says of how something was made: the manifests in words, and nothing else."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from extend.adapter_format.sidecar import ModuleReport, Sidecar
from extend.publish.naming import Names
from extend.publish.provenance import StageOutput
from extend.results import format_length

Row = tuple[str, ...]
_MOST_SHOWN = 4  # factors of a list


def rope_rows(before: Mapping[str, Any] | None, after: Mapping[str, Any],
              lengths: tuple[int | None, int]) -> list[Row]:
    """(key, before, after) of a RoPE and of the longest context, in tokens.

    Args:
        before, after: `RopeSpec.to_json`; `before` is None where it is not known.
    """
    old, new = _entries(before or {}), _entries(after)
    rows = [("longest context, tokens", _number(lengths[0]), _number(lengths[1]))]
    return rows + [(key, _value(old.get(key)), _value(new.get(key)))
                   for key in dict.fromkeys([*old, *new])]


def _entries(rope: Mapping[str, Any]) -> dict[str, Any]:
    if not rope:
        return {}
    scaling = {"rope_type": "default", **rope["scaling"]}
    return {"rope_theta": rope["rope_theta"], **scaling, "counted from": rope["original_len"]}


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and len(value) > _MOST_SHOWN:
        return f"{len(value)} values from {min(value):.6g} to {max(value):.6g}"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def stage_rows(lineage: Sequence[StageOutput], names: Names) -> list[Row]:
    """(name, stage, from, what it did) of the stages that led to what is published."""
    return [(output.name, output.stage, _inputs(output, names), _done(output))
            for output in lineage]


def in_words(output: StageOutput, names: Names) -> str:
    """The same of one stage, in a line."""
    parts = (output.stage, _inputs(output, names), _done(output))
    return f"{output.name} ({'; '.join(part for part in parts if part)})"


def _done(output: StageOutput) -> str:
    return _DESCRIBE.get(output.stage, lambda _: "")(output.manifest)


def _inputs(output: StageOutput, names: Names) -> str:
    known = {role: names.of(str(entry["path"]))
             for role, entry in output.manifest["inputs"].items()}
    return ", ".join(f"{role} {name}" for role, name in known.items())


def _rescale(manifest: Mapping[str, Any]) -> str:
    options = manifest["options"]
    others = {key: value for key, value in options.items()
              if key not in ("method", "target_len", "sliding_window", "from_len")}
    more = "".join(f", {key} {_value(value)}" for key, value in others.items()
                   if value is not None and not isinstance(value, dict))
    return f"{options['method']} to {format_length(options['target_len'])}{more}"


def _train(manifest: Mapping[str, Any]) -> str:
    options, metrics = manifest["options"], manifest["results"].get("metrics", {})
    phases = "; ".join(_phase(phase) for phase in options["schedule"])
    mode = options["mode"] if options["mode"] != "lora" else f"LoRA of rank {options['lora_rank']}"
    tokens = f"; {metrics['tokens']:,} tokens in all" if metrics.get("tokens") else ""
    loss = f", last loss {metrics['loss']:.4f}" if metrics.get("loss") is not None else ""
    processes = manifest["results"].get("processes", 1)
    return (f"{mode}, {options['optimizer']}: {phases}{tokens}{loss}; "
            f"{processes} process{'es' * (processes > 1)}")


def _phase(phase: Mapping[str, Any]) -> str:
    rows = f"{phase['batch_rows']} row{'s' * (phase['batch_rows'] > 1)}"
    amount = f"{phase['steps']} steps" if phase.get("steps") else \
        f"{format_length(phase['tokens'])} tokens"
    return f"{amount} of {rows} of {format_length(phase['length'])}, lr {phase['lr']:g}"


def _extract(manifest: Mapping[str, Any]) -> str:
    options, results = manifest["options"], manifest["results"]
    size = next((f"{key} {options[key]}" for key in ("rank", "energy", "adapter_bytes")
                 if options.get(key) is not None), f"rule {options.get('rule', 'noise')}")
    return (f"{size}; {results['modules']} matrices, largest rank {results['max_rank']}, "
            f"mean residual {results['mean_residual']:.3f}, largest "
            f"{results['max_residual']:.3f}; {results['sidecar_tensors']} tensors whole")


def _merge(manifest: Mapping[str, Any]) -> str:
    options = manifest["options"]
    verdicts = [entry["verdict"] for entry in (manifest["results"].get("lineage") or {}).values()
                if isinstance(entry, dict) and entry.get("verdict")]
    return f"method {options['method']}, weight {options['weight']}" \
        + "".join(f"; the target is {verdict}" for verdict in verdicts)


def _eval(manifest: Mapping[str, Any]) -> str:
    tasks = [task["name"] if isinstance(task, dict) else str(task)
             for task in manifest["options"].get("tasks", [])]
    return f"{', '.join(tasks)}; {manifest['results'].get('rows', 0)} cells"


def _steps(manifest: Mapping[str, Any]) -> str:
    return f"{manifest['results'].get('step', 0)} steps"


_DESCRIBE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "rescale": _rescale, "train": _train, "extract": _extract, "merge": _merge, "eval": _eval,
    "repair": _steps}


def residual_rows(sidecar: Sidecar) -> list[Row]:
    """(matrices, how many, ranks, residual, largest) by kind of matrix, and of all together."""
    kinds: dict[str, list[ModuleReport]] = {}
    for name, report in sidecar.modules.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(report)
    rows = [_residual_row(kind, reports) for kind, reports in sorted(kinds.items())]
    return [*rows, _residual_row("all", list(sidecar.modules.values()))] if rows else []


def _residual_row(kind: str, reports: Sequence[ModuleReport]) -> Row:
    """`residual` is that of all their deltas taken together: ||delta - B A|| / ||delta||."""
    squares = math.fsum(r.delta_norm ** 2 for r in reports)
    left = math.fsum((r.residual * r.delta_norm) ** 2 for r in reports)
    low, high = min(r.rank for r in reports), max(r.rank for r in reports)
    return (kind, str(len(reports)), str(low) if low == high else f"{low} to {high}",
            f"{math.sqrt(left / squares):.3f}" if squares else "0",
            f"{max(r.residual for r in reports):.3f}")


def sidecar_limits(sidecar: Sidecar, unserved: Mapping[str, Any] | None) -> Iterator[str]:
    """What an adapter does not carry."""
    yield ("A LoRA carries no RoPE: load the base with the long RoPE, as above, or the adapter is "
           "read at positions that it was not made for.")
    if unserved and unserved["tensors"]:
        size = "" if unserved["relative_norm"] is None else \
            f" (|delta| / |W| {unserved['relative_norm']:.2e})"
        yield (f"{unserved['tensors']} deltas (norms, biases, embeddings, fused experts) lie in "
               "`extend_sidecar.safetensors` and reach no loader but `extend merge`; the largest "
               f"is that of `{unserved['largest']}`{size}.")
    if sidecar.left_out:
        yield (f"{len(sidecar.left_out)} deltas were left out on request, such as "
               f"`{next(iter(sidecar.left_out))}`.")
    totals = residual_rows(sidecar)
    if totals:
        yield (f"The factors miss {totals[-1][3]} of the delta's norm (residual, all matrices); "
               "a merge is not the long model itself.")
