"""Up to which length a model does what it should, by two published rules.

Lengths stand in ascending order, as in `{"4096": {"score", "n", "wilson_low", "wilson_high"}}`.
A length counts by its point estimate; `length_low` is what the rule would give if it counted by the
lower end of its 95 % interval.
"""

from collections.abc import Callable, Mapping
from typing import Any

from extend.evaluate.score import mean_of_tasks

OWN_SHARE = 0.85
RULER_THRESHOLD = 0.856
RULER_TASKS = 13

OWN_RULE = (
    f"the largest length at which a task's mean score is at least {100 * OWN_SHARE:g} % of its own "
    "at the shortest length asked, all lengths between included; 0 when the shortest length's "
    "score is not surely above chance; over several tasks the smallest of theirs")
RULER_RULE = (
    f"the largest length at which the mean over the RULER tasks is above {100 * RULER_THRESHOLD:g} "
    "%, all shorter lengths included; 0 when the shortest fails. RULER's own figure is over all "
    f"{RULER_TASKS} of its tasks, 500 prompts each")

Entry = Mapping[str, Any]


def own_rule(by_length: Mapping[str, Entry], chance: float | None) -> dict[str, Any]:
    """OWN_RULE for one task.

    Args:
        by_length: not empty.
        chance: score of guessing, 0 when it is not known.

    Source: Modarressi et al. 2025, arXiv:2502.05167: 85 % of the score on short contexts.
    """
    reference = next(iter(by_length.values()))
    threshold = OWN_SHARE * reference["score"]
    sure = reference["wilson_low"] > (chance or 0.0)
    reached = {key: _reach(by_length, lambda e, key=key: e[key] >= threshold) if sure else 0
               for key in ("score", "wilson_low")}
    return {"length": reached["score"], "length_low": reached["wilson_low"],
            "threshold": round(threshold, 6), "reference_score": reference["score"],
            "reference_length": int(next(iter(by_length))),
            "longest_asked": max(map(int, by_length)), "above_chance": sure,
            "n": min(entry["n"] for entry in by_length.values())}


def ruler_rule(tasks: Mapping[str, Mapping[str, Entry]]) -> dict[str, Any] | None:
    """RULER_RULE over the RULER tasks of a run, None without any.

    Only lengths that every one of the tasks was asked at have a mean.

    Args:
        tasks: name -> its `by_length`.

    Source: https://github.com/NVIDIA/RULER, README at commit c3f5e3b: the threshold is the average
    of Llama2-7B-chat at 4K.
    """
    if not tasks:
        return None
    asked = sorted({int(length) for by_length in tasks.values() for length in by_length})
    means = {str(n): mean_of_tasks([by_length[str(n)] for by_length in tasks.values()])
             for n in asked if all(str(n) in by_length for by_length in tasks.values())}
    return {"rule": RULER_RULE, "threshold": RULER_THRESHOLD, "tasks": list(tasks),
            "of": RULER_TASKS, "length": _reach(means, lambda e: e["score"] > RULER_THRESHOLD),
            "length_low": _reach(means, lambda e: e["wilson_low"] > RULER_THRESHOLD),
            "longest_asked": max(map(int, means), default=0), "lengths": means,
            "not_asked_by_all": [n for n in asked if str(n) not in means],
            "interval": "95 %, from the tasks' Wilson intervals, added as variances are"}


def smallest(rules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """OWN_RULE over several tasks, None without any."""
    if not rules:
        return None
    limit = min(rules, key=lambda name: rules[name]["length"])
    return {"rule": OWN_RULE, "length": rules[limit]["length"], "tasks": list(rules),
            "length_low": min(rule["length_low"] for rule in rules.values()),
            "limited_by": limit, "n": min(rule["n"] for rule in rules.values())}


def _reach(by_length: Mapping[str, Entry], passes: Callable[[Entry], bool]) -> int:
    """The last length before the first that fails."""
    reached = 0
    for length, entry in by_length.items():
        if not passes(entry):
            break
        reached = int(length)
    return reached
