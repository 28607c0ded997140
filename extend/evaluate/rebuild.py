"""Build a prompt of some results again, and prove by its hash that it is the same."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError, CompatibilityError, ExtendError, RecipeError
from extend.evaluate.frame import Frame
from extend.evaluate.measures.row import hash_ids
from extend.evaluate.plan import plan_tasks, with_base
from extend.evaluate.provenance import hash_tokenizer
from extend.evaluate.tasks.task import BASE, Cell, Prompt, Task
from extend.inputs import local_path
from extend.manifest import hash_content, versions
from extend.results import read_results
from extend.tokenizer import load_tokenizer

_SHORT = 16  # digits of a sha256 in messages


@dataclass(frozen=True, slots=True)
class RebuiltPrompt:
    """A prompt whose ids have the hash that the results hold.

    Attributes:
        text: of all ids, special tokens included.
        ids: the prompt, and the answer where it is known: the last `answer_len`.
        max_new_tokens: what the model was allowed to write.
        cell: task, name, length, depth and control of its row.
        changed: files that are not those of the evaluation, though this prompt does not show it.
    """

    text: str
    ids: list[int]
    answer_len: int
    max_new_tokens: int
    sha256: str
    cell: Mapping[str, Any]
    trial: int
    details: Mapping[str, Any]
    changed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**self.cell, "trial": self.trial, "sha256": self.sha256, "tokens": len(self.ids),
                "answer_len": self.answer_len, "max_new_tokens": self.max_new_tokens,
                "details": dict(self.details), "changed": list(self.changed), "text": self.text,
                "ids": self.ids}


def rebuild_prompt(results: Path | str, row: int, trial: int = 0, *,
                   model: Path | str | None = None,
                   inputs: Mapping[str, Path | str] | None = None) -> RebuiltPrompt:
    """Build one prompt of an evaluation again and check it against its recorded hash.

    Args:
        results: results.json or its directory.
        row: index into `rows`, from 0.
        trial: index into the row's prompts, from 0.
        model: directory of the tokenizer; the scored model unless given.
        inputs: `<name of the task>.<option>` -> path, of files that are elsewhere now.

    Raises:
        RecipeError: no such row, trial or input.
        CheckpointError: results or a tokenizer that cannot be read, or a file that is not there.
        CompatibilityError: the prompt is another one; says which files are, with both hashes.
    """
    found = read_results({"results": results})[0]
    run, entry = _entry(found.data, found.path, row)
    expected = _recorded_hash(entry, found.path, row, trial)
    model = local_path(model or found.data["model"]["path"], weights=False)
    spec = _spec(run, entry["name"], found.path, inputs or {})
    changed = [*_changed_tokenizer(run, model), *_changed_inputs(run, spec)]
    try:
        task, cell = _plan(run, spec, found.data["rows"], row)
        frame = Frame.of(load_tokenizer(model), run["template"],
                         thinking=run["thinking"])
        prompt = task.prompts(frame, cell, run["seed"])[trial]
    except (ExtendError, IndexError) as error:
        if not changed:
            raise
        raise CompatibilityError(f"{found.path}: row {row} cannot be rebuilt ({error}); "
                                 f"{_why(run, changed)}") from None
    if hash_ids(prompt.ids) != expected:
        raise CompatibilityError(
            f"{found.path}: row {row} trial {trial} is another prompt: rebuilt, its ids have "
            f"sha256 {hash_ids(prompt.ids)[:_SHORT]} instead of {expected[:_SHORT]}; "
            f"{_why(run, changed)}")
    return _rebuilt(frame, prompt, expected, entry, trial, changed)


def _entry(data: Mapping[str, Any], path: Path, row: int) -> tuple[Mapping[str, Any], Any]:
    if "run" not in data:
        raise CheckpointError(f"{path}: does not hold what its prompts were made of; evaluate "
                              "again with this version")
    if not 0 <= row < len(data["rows"]):
        raise RecipeError(f"{path}: row {row} is not there; it has rows 0 to "
                          f"{len(data['rows']) - 1}")
    return data["run"], data["rows"][row]


def _recorded_hash(entry: Mapping[str, Any], path: Path, row: int, trial: int) -> str:
    hashes = entry.get("trial_sha256")
    if not hashes:
        raise CheckpointError(f"{path}: row {row} ({entry['name']}) holds no hashes of its "
                              "prompts; evaluate again with this version")
    if not 0 <= trial < len(hashes):
        raise RecipeError(f"{path}: row {row} ({entry['name']}) has trials 0 to "
                          f"{len(hashes) - 1}, not {trial}")
    return hashes[trial]


def _spec(run: Mapping[str, Any], name: str, path: Path,
          inputs: Mapping[str, Path | str]) -> dict[str, Any]:
    """The task's options, with the files where they are now."""
    spec = next((dict(s) for s in run["tasks"] if s["name"] == name), None)
    if spec is None:
        raise CheckpointError(f"{path}: its run has no task {name!r}")
    for role, file in inputs.items():
        if role not in run["inputs"] or role == "model":
            known = ", ".join(r for r in run["inputs"] if r not in ("model", "adapter"))
            raise RecipeError(f"input {role!r}: the results have {known or 'no such inputs'}")
        owner, _, option = role.rpartition(".")
        if owner == name:
            spec[option] = str(file)
    return spec


def _changed_tokenizer(run: Mapping[str, Any], model: Path) -> list[str]:
    then, now = run["tokenizer"]["files"], hash_tokenizer(model)["files"]
    return [f"{model / name} has sha256 {_short(now.get(name))} instead of "
            f"{_short(then.get(name))}"
            for name in sorted({*then, *now}) if then.get(name) != now.get(name)]


def _changed_inputs(run: Mapping[str, Any], spec: Mapping[str, Any]) -> list[str]:
    changed = []
    for role, recorded in run["inputs"].items():
        owner, _, option = role.rpartition(".")
        if owner != spec["name"] or option not in spec:
            continue
        try:
            now = hash_content(spec[option])
        except CheckpointError as error:
            raise CheckpointError(f"{error} (the {role} of the evaluation, sha256 "
                                  f"{_short(recorded['sha256'])}); say where it is now with "
                                  f"--input {role}=PATH") from None
        if now != recorded["sha256"]:
            changed.append(f"the {role} {spec[option]} has sha256 {_short(now)} instead of "
                           f"{_short(recorded['sha256'])}")
    return changed


def _short(sha256: str | None) -> str:
    return sha256[:_SHORT] if sha256 else "none (no such file)"


def _plan(run: Mapping[str, Any], spec: Mapping[str, Any], rows: list[Mapping[str, Any]],
          row: int) -> tuple[Task, Cell]:
    """The task, and the cell that gave the row: rows are in the order of the plan."""
    alone = plan_tasks([spec], lengths=run["lengths"], depths=run["depths"], trials=run["trials"])
    planned, = with_base(alone, run["base_len"]) if run["base_len"] else alone
    place = sum(earlier["name"] == spec["name"] for earlier in rows[:row])
    entry = rows[row]
    cell = planned.cells[place] if place < len(planned.cells) else None
    if cell is None or (cell.depth, cell.control) != (entry["depth"], entry["control"]):
        raise CompatibilityError(
            f"row {row} of {spec['name']} has depth {entry['depth']} and control "
            f"{entry['control']}, but its options now give {cell}; use the version "
            f"{run['versions']['extend']} of extend-context")
    return planned.task, replace(cell, control=None) if cell.control == BASE else cell


def _why(run: Mapping[str, Any], changed: list[str]) -> str:
    if changed:
        return "; ".join(changed) + "; give the files that the evaluation had"
    now, then = versions(), run["versions"]
    others = [f"{name} {now.get(name)} instead of {version}" for name, version in then.items()
              if now.get(name) != version]
    return ("its tokenizer and inputs are those of the evaluation; "
            + (f"what differs is {', '.join(others)}" if others else
               "the recorded hash or options were changed"))


def _rebuilt(frame: Frame, prompt: Prompt, sha256: str, entry: Mapping[str, Any], trial: int,
             changed: list[str]) -> RebuiltPrompt:
    ids = [int(token) for token in prompt.ids]
    cell = {key: entry[key] for key in ("task", "name", "length", "depth", "control", "seed")}
    return RebuiltPrompt(frame.tokenizer.decode(ids), ids, prompt.answer_len,
                         prompt.max_new_tokens, sha256, cell, trial, prompt.details,
                         tuple(changed))
