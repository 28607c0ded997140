"""Would vLLM and SGLang serve this adapter, and with which rank limit?

To add an engine: its rules, as functions of a `ServingView`, and one line in `ENGINES`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from extend.adapter_format.serving_rules import (
    REFUSES,
    SGLANG,
    VLLM,
    VLLM_OLD,
    WRONG,
    Problem,
    Rule,
    max_lora_rank,
)
from extend.adapter_format.serving_view import ServingView, read_view

OK = "ok"


class Engine(NamedTuple):
    """One engine.

    Attributes:
        rules: what it refuses or computes wrongly.
        version: the one whose loader the rules restate.
        current: False for a version that a newer one has replaced.
        lists_ranks: whether its rank limit is one of a list.
    """

    rules: tuple[Rule, ...]
    version: str
    current: bool = True
    lists_ranks: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingVerdict:
    """What one engine makes of an adapter.

    Attributes:
        engine: name in `ENGINES`.
        max_rank: what to give as its `--max-lora-rank`; None where no value would do.
        problems: empty when it serves base plus adapter.
    """

    engine: str
    version: str
    current: bool
    max_rank: int | None
    problems: tuple[Problem, ...]

    @property
    def verdict(self) -> str:
        """`ok`, `refuses`, or `wrong` where it loads but computes something else."""
        found = {problem.verdict for problem in self.problems}
        return REFUSES if REFUSES in found else WRONG if found else OK

    def to_json(self) -> dict[str, Any]:
        return {"version": self.version, "verdict": self.verdict, "max_lora_rank": self.max_rank,
                "problems": [problem._asdict() for problem in self.problems]}


def check_serving(directory: Path | str) -> tuple[ServingVerdict, ...]:
    """One verdict for each engine on the LoRA files of an adapter directory.

    Reads headers and configs only. What lies in a sidecar reaches no server; `unserved` says what
    that is.

    Raises:
        CheckpointError: a file is missing, damaged, or lacks what every engine needs.
    """
    view = read_view(directory)
    return tuple(_judge(name, engine, view) for name, engine in ENGINES.items())


def _judge(name: str, engine: Engine, view: ServingView) -> ServingVerdict:
    rank = max_lora_rank(view.largest_rank) if engine.lists_ranks else view.largest_rank
    problems = tuple(problem for rule in engine.rules for problem in rule(view))
    return ServingVerdict(engine=name, version=engine.version, current=engine.current,
                          max_rank=rank, problems=problems)


ENGINES: dict[str, Engine] = {
    "vllm-old": Engine(VLLM_OLD, "0.11.0", current=False),
    "vllm": Engine(VLLM, "0.33.0"),
    "sglang": Engine(SGLANG, "0.5.23", lists_ranks=False),
}
