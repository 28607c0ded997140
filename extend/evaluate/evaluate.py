"""The eval stage: a grid of tasks, lengths and depths, scored exactly and resumable."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from extend.errors import CompatibilityError, ExtendError, RecipeError
from extend.evaluate.frame import Frame, Template
from extend.evaluate.plan import PlannedTask, order_units, plan_tasks, with_base
from extend.evaluate.provenance import chance_levels, describe_run, describe_tasks
from extend.evaluate.rows import RowStore
from extend.evaluate.runner import Runner, Server, make_runner
from extend.evaluate.summary import summarize
from extend.evaluate.summary_text import summary_text
from extend.evaluate.tasks.task import BASE
from extend.inputs import name_inputs, takes_models
from extend.lock import holding
from extend.manifest import Manifest
from extend.model_config import ModelConfig, read_config
from extend.options import local_tasks
from extend.output import atomic_directory, write_json
from extend.results import RESULTS_NAME

logger = logging.getLogger(__name__)
SCHEMA = 1


@takes_models("model", "adapter", "base")
def evaluate(model: Path | str, out: Path | str, *,
             tasks: Sequence[str | Mapping[str, Any]], lengths: Sequence[int | str] = (),
             depths: int | Sequence[float] = 10, trials: int = 5, seed: int = 0,
             adapter: Path | str | None = None, device: str = "auto", dtype: str = "auto",
             nproc: int | str = 1, chunk: int | None = None, template: Template = "auto",
             thinking: int = 0, base: Path | str | None = None, context_parallel: int = 1,
             server: Server | None = None, overwrite: bool = False) -> Path:
    """Score a model and write `results.json`; return its path.

    Each finished row is kept beside `out`, so that the same call goes on after an interruption.
    Rows depend on the model, the options and the seed, not on `nproc`.

    Args:
        model: checkpoint directory. It may be asked beyond its `max_position_embeddings`; such
            rows say so.
        tasks: names in `extend.evaluate.tasks.TASKS`, or mappings with `task`, its options, and
            its own `name`, `lengths`, `depths` or `trials`.
        lengths: tokens of prompt and answer together.
        depths: number of depths spread equally from 0 to 1, or the depths themselves.
        trials: prompts for each length and depth.
        adapter: directory of an adapter to add to the model in memory first.
        dtype: of weights and activations; `auto` is bfloat16 on a GPU and float32 on the CPU.
        nproc: processes, one a GPU; `auto` is one for each visible GPU.
        chunk: most tokens in one forward; chosen for the device unless given.
        template: `chat` puts every prompt into the model's chat template; `base` and `auto` do
            not.
        thinking: tokens that a thinking model may think before it writes an answer, within the
            length; 0 tells it not to think.
        base: the model before its context was extended. Each task on a grid is then put to it
            too, at its native length, as one more control.
        context_parallel: processes, one a GPU, that share every row by ring attention. Under
            torchrun it is those that torchrun started; all but the first return when it does.
        server: address of an OpenAI-compatible server that runs the model, or a mapping with
            `url` and the options of `extend.evaluate.backends.served.ServerOptions`; `model` then
            only gives tokenizer and config.

    Raises:
        RecipeError: a wrong task or option, or options that exclude one another.
        ServerError: a server that does not answer.
        DataError: text that is missing or too short for a length.
        CheckpointError: a checkpoint that cannot be read, or `out` exists.
        CompatibilityError: a model, adapter or device that does not fit.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return _follow(out)
    _check_numbers(seed, chunk, nproc)
    planned = plan_tasks(local_tasks(tasks), lengths=lengths, depths=depths, trials=trials)
    native_len = None if base is None else read_config(base).max_position_embeddings
    planned = planned if native_len is None else with_base(planned, native_len)
    paths = _input_paths(model, adapter, base, planned)
    with holding(out):
        with atomic_directory(out, overwrite=overwrite, inputs=paths) as partial:
            from extend.evaluate.adapted import adapted_config
            from extend.tokenizer import load_tokenizer

            config = adapted_config(model, adapter)
            tokenizer = load_tokenizer(model)
            runner = make_runner(tokenizer, planned, device=device, dtype=dtype, chunk=chunk,
                                 nproc=nproc, context_parallel=context_parallel, server=server,
                                 others={"adapter": adapter, "base": base})
            settings = {**runner.settings, "template": template, "thinking": thinking}
            _check_prompts(Frame.of(tokenizer, template, thinking=thinking), planned, seed)
            manifest = Manifest("eval", paths, {
                "tasks": describe_tasks(planned),
                "cells": [cell.key for entry in planned for cell in entry.cells], **settings}, seed)
            store = RowStore.open(_rows_directory(Path(out)), {
                key: manifest.record[key] for key in ("inputs", "options", "seed", "versions")})
            try:
                rows = _score(store, planned, runner, model=str(model), seed=seed, device=device,
                              adapter=None if adapter is None else str(adapter),
                              base=None if base is None else str(base),
                              dtype=settings["dtype"], chunk=settings["chunk"], template=template,
                              thinking=thinking)
            except (ExtendError, OSError):
                store.remove_if_empty()
                raise
            results = name_inputs({
                "schema": SCHEMA, "model": _describe_model(config, manifest, settings),
                "run": describe_run(manifest.record, planned, model=model, template=template,
                                    thinking=thinking, lengths=lengths, depths=depths,
                                    trials=trials, base_len=native_len),
                "summary": summarize(rows, chance_levels(planned)), "rows": rows})
            logger.info("%s", summary_text(results["summary"]))
            write_json(partial / RESULTS_NAME, results)
            manifest.write(partial, rows=len(rows),
                           effective_length=results["summary"]["effective_length"])
        store.remove()
    return Path(out) / RESULTS_NAME


def _follow(out: Path | str) -> Path:
    """What a process that torchrun started beside the first one does."""
    from extend.evaluate.ring_workers import follow

    follow()
    return Path(out) / RESULTS_NAME


def _check_numbers(seed: int, chunk: int | None, nproc: int | str) -> None:
    if nproc != "auto" and (not isinstance(nproc, int) or nproc < 1):
        raise RecipeError(f"nproc: {nproc!r} is neither auto nor a number of at least 1")
    if chunk is not None and chunk < 1:
        raise RecipeError(f"chunk: {chunk!r} is not a number of at least 1")
    if not isinstance(seed, int):
        raise RecipeError(f"seed: {seed!r} is not an integer")


def _input_paths(model: Path | str, adapter: Path | str | None, base: Path | str | None,
                 planned: Sequence[PlannedTask]) -> dict[str, Path]:
    paths = {"model": Path(model), **{
        name: Path(path) for name, path in (("adapter", adapter), ("base", base)) if path}}
    for entry in planned:
        for option, path in entry.task.inputs().items():
            paths[f"{entry.name}.{option}"] = Path(path)
    return paths


def _check_prompts(frame: Frame, planned: Sequence[PlannedTask], seed: int) -> None:
    """Build one prompt of each length: what cannot work is said before hours of work."""
    from dataclasses import replace

    for entry in planned:
        first = {(cell.length, cell.control): cell for cell in reversed(entry.cells)}
        for cell in first.values():
            trials = 1 if entry.task.on_grid else cell.trials
            control = None if cell.control == BASE else cell.control
            entry.task.prompts(frame, replace(cell, trials=trials, control=control), seed)


def _score(store: RowStore, planned: Sequence[PlannedTask], runner: Runner,
           **job: Any) -> list[dict[str, Any]]:
    """Rows of all cells in the order of the plan; those already in the store are not redone."""
    from extend.evaluate.cells import Job

    done = store.read()
    if done:
        logger.info("%d of %d rows are there already", len(done),
                    sum(len(entry.cells) for entry in planned))
    runner.run(Job(rows=store.directory, **job), order_units(planned, done.keys()))
    done = store.read()
    missing = [cell.key for entry in planned for cell in entry.cells if cell.key not in done]
    if missing:
        raise CompatibilityError(f"{len(missing)} cells have no row, the first {missing[0]}; run "
                                 "the same command again")
    return [done[cell.key] for entry in planned for cell in entry.cells]


def _describe_model(config: ModelConfig, manifest: Manifest,
                    settings: Mapping[str, Any]) -> dict[str, Any]:
    inputs = manifest.record["inputs"]
    return {**inputs["model"], "adapter": inputs.get("adapter"),
            "architecture": config.architecture,
            "max_position_embeddings": config.max_position_embeddings,
            "rope": config.rope.to_json(),
            **{key: value for key, value in settings.items() if key != "chunk"}}


def _rows_directory(out: Path) -> Path:
    out = out.absolute()
    return out.with_name(f".{out.name}.rows")
