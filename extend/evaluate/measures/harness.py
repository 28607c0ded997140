"""Rows from EleutherAI's lm-evaluation-harness, run on the model in this process."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from extend.errors import DataError
from extend.evaluate.backends.backend import Backend
from extend.evaluate.frame import Frame
from extend.evaluate.measures.capability import require
from extend.evaluate.measures.row import DIGITS
from extend.evaluate.score import proportion
from extend.evaluate.tasks.harness import LMEval
from extend.evaluate.tasks.task import Cell

_SPECIAL = 8  # tokens that a tokenizer may add to a text at most

# Its metrics of loss; all others that lie in 0 to 1 are scores.
_LOSSES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score")


def harness(backend: Backend, frame: Frame, task: LMEval, cells: Sequence[Cell],
            seed: int) -> list[dict[str, Any]]:
    """One row for each of the harness's tasks, with its metrics and their standard errors.

    Raises:
        DataError: the harness has no such task, or lacks its data; or a request that it cut to
            the model's length.
    """
    local = require(backend, cells[0], "model", "tokenizer")
    task.prompts(frame, cells[0], seed)  # is it installed?
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with plain_attention(local.model), contextlib.redirect_stdout(sys.stderr), \
            widest_input(local.model) as widest:
        lm = HFLM(pretrained=local.model, tokenizer=local.tokenizer, batch_size=task.batch_size,
                  max_length=local.model.config.max_position_embeddings)
        manager = TaskManager(include_path=task.include_path)
        _refuse_tags(task.names(), manager)
        try:
            results = lm_eval.simple_evaluate(
                model=lm, tasks=task.names(), num_fewshot=task.num_fewshot, limit=task.limit,
                task_manager=manager, log_samples=True, apply_chat_template=frame.chat,
                random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
                fewshot_random_seed=seed)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise DataError(f"{task.tasks}: lm-eval cannot run it ({_first_line(error)}); see "
                            "`lm-eval ls tasks`, and fetch its data where there is a "
                            "network") from error
    version = getattr(lm_eval, "__version__", "unknown")
    return [{"task": cell.task, "name": cell.name, "length": None, "actual_length": widest[0],
             "depth": None, "actual_depth": None, "control": cell.control, "seed": seed,
             **describe_results(results, name, task.metric, lm), "lm_eval": version}
            for cell, name in zip(cells, task.names(), strict=True)]


@contextlib.contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Within it the model attends as transformers does: the harness pads rows and masks them."""
    name = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(name)


@contextlib.contextmanager
def widest_input(model: Any) -> Iterator[list[int]]:
    """A list whose only number becomes that of the tokens in the longest row that was read."""
    widest = [0]

    def see(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None:
            widest[0] = max(widest[0], ids.shape[-1])

    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield widest
    finally:
        hook.remove()


def _refuse_tags(names: Sequence[str], manager: Any) -> None:
    tags = [name for name in names if name in getattr(manager, "all_tags", ())]
    if tags:
        raise DataError(f"lm-eval: {tags[0]!r} is a tag of several tasks without a score of its "
                        "own; name the tasks themselves")


def describe_results(results: Mapping[str, Any], name: str, metric: str | None,
                     lm: Any) -> dict[str, Any]:
    """The score of one task or group of tasks, with every metric that the harness gives.

    Args:
        results: what `lm_eval.simple_evaluate` returned.
        metric: whose value is the score, such as `acc_norm`.
        lm: the harness's model: with `max_length`, `max_gen_toks` and `tok_encode`.

    Raises:
        DataError: no such metric, or a request that was cut.
    """
    entries = {**results["results"], **(results.get("groups") or {})}
    metrics = read_metrics(entries.get(name, {}))  # some groups have no metric of their own
    leaves = _leaves(results, name)
    samples = [sample for leaf in leaves for sample in results["samples"].get(leaf, ())]
    _refuse_cut(samples, name, lm)
    n = sum(results["n-samples"][leaf]["effective"] for leaf in leaves)
    chosen = metric or next((key for key, entry in metrics.items() if _is_score(key, entry)), None)
    if metric is not None and metric not in metrics:
        raise DataError(f"{name}: has no metric {metric!r}; it has {', '.join(metrics)}")
    row = {"metric": chosen, "metrics": metrics, "num_fewshot": results["n-shot"].get(name),
           "prompt_sha256": _hash(samples), "n": n, "score": None}
    if leaves != [name]:
        row["subtasks"] = {leaf: read_metrics(entries[leaf]) for leaf in leaves}
    if chosen is None or not _is_score(chosen, metrics[chosen]):
        return row
    value = metrics[chosen]["value"]
    return {**row, **proportion(value * n, n), "correct": round(value * n),
            "stderr": metrics[chosen]["stderr"]}


def read_metrics(entry: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """`acc,none` and `acc_stderr,none` of the harness as `acc`: value and stderr.

    Metrics of a filter of another name keep it: `exact_match,strict-match`.
    """
    found = {}
    for key, value in entry.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = entry.get(f"{metric}_stderr,{kind}")
        found[metric if kind == "none" else key] = {
            "value": round(float(value), DIGITS),
            "stderr": round(float(error), DIGITS) if isinstance(error, int | float) else None}
    return found


def _is_score(metric: str, entry: Mapping[str, Any]) -> bool:
    return metric.partition(",")[0] not in _LOSSES and 0 <= entry["value"] <= 1


def _leaves(results: Mapping[str, Any], name: str) -> list[str]:
    """The tasks that a group stands for, or the task itself."""
    members = (results.get("group_subtasks") or {}).get(name)
    return [leaf for member in members for leaf in _leaves(results, member)] if members else [name]


def _refuse_cut(samples: Sequence[Mapping[str, Any]], name: str, lm: Any) -> None:
    """The harness cuts what is too long on the left, and says so in its log at most."""
    for sample in samples:
        for request in sample["arguments"]:
            if len(request) < 2:  # a whole text, which it reads in windows
                continue
            text, rest = request[0], request[1]
            room = lm.max_length
            if isinstance(rest, str):
                text, room = text + rest, room + 1  # the last token is not read
            else:
                room -= rest.get("max_gen_toks", lm.max_gen_toks)
            if len(text.encode()) + _SPECIAL <= room:  # no token is less than a byte
                continue
            tokens = len(lm.tok_encode(text))
            if tokens > room:
                raise DataError(f"{name}: a request of {tokens} tokens does not fit into the "
                                f"{room} that the model has for it, and lm-eval cut it; use fewer "
                                "examples (num_fewshot) or a model with more context")


def _hash(samples: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(sample["arguments"], default=str).encode() + b"\n")
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return next(iter(text.strip().splitlines()), type(error).__name__)
