"""The summary of results as lines of text; a share never stands without its number of prompts."""

from collections.abc import Iterator, Mapping
from typing import Any

from extend.results import format_length, format_rate

Summary = Mapping[str, Any]


def summary_text(summary: Summary) -> str:
    """Scores by length, controls, effective lengths and what they rest on, warnings."""
    lines = [*_tasks(summary), *_skills_and_losses(summary), *_effective(summary),
             *(f"warning: {warning}" for warning in summary["warnings"])]
    return "\n".join(lines)


def _tasks(summary: Summary) -> Iterator[str]:
    for name, task in summary["tasks"].items():
        shown = f"{name} (many facts in one prompt: harder)" if task["stream"] else name
        scores = [f"{format_length(int(length))} {format_rate(entry)}"
                  for length, entry in task["lengths"].items()]
        scores += [f"{control} {format_rate(entry)}"
                   for control, entry in task["controls"].items()]
        yield f"{shown}: {', '.join(scores)}"
        if task.get("spot_check"):
            yield f"{name}, spot check: {format_check(task['spot_check'])}"


def _skills_and_losses(summary: Summary) -> Iterator[str]:
    for name, entry in summary["skills"].items():
        yield f"{name}: {format_rate(entry)}"
    for name, entry in summary["losses"].items():
        loss = "no loss" if entry["loss"] is None else f"{entry['loss']:.4f} nats a token"
        yield f"{name}: {loss} over {entry['tokens']} tokens"
    for name, entry in summary["curves"].items():
        yield f"{name}: {format_slope(entry)}"
    for name, entry in summary["divergences"].items():
        yield f"{name}: {format_divergence(entry)}"


def _effective(summary: Summary) -> Iterator[str]:
    own, ruler = summary["effective_lengths"]["own"], summary["effective_lengths"]["ruler"]
    if own is not None:
        yield f"effective length by 85 % of the own short score: {format_own(summary)}"
    if ruler is not None:
        yield f"effective length by RULER's rule, above 85.6 %: {format_ruler(summary)}"


def reached(rule: Mapping[str, Any]) -> str:
    """A rule's length; the longest that was asked is no limit of the model."""
    if not rule["length"]:
        return "none"
    open_end = rule["length"] == rule.get("longest_asked")
    return format_length(rule["length"]) + (" or more" if open_end else "")


def own_of(summary: Summary) -> dict[str, Any]:
    """OWN_RULE over all tasks, with `longest_asked` and the `short` score of the limiting task."""
    own = summary["effective_lengths"]["own"]
    task = summary["tasks"][own["limited_by"]]
    length = task["own_rule"]["reference_length"]
    short = f"{format_rate(task['lengths'][str(length)])} at {format_length(length)}"
    return {**own, "longest_asked": task["own_rule"]["longest_asked"], "short": short}


def format_own(summary: Summary) -> str:
    """OWN_RULE over all tasks and what it rests on."""
    own = own_of(summary)
    count = len(own["tasks"])
    of = own["limited_by"] if count == 1 else (
        f"{own['limited_by']}, the smallest of {count} tasks")
    of += f", {own['short']}"
    return (f"{reached(own)} ({of}; at least {own['n']} prompts a length; by the lower ends of "
            f"the intervals {format_length(own['length_low']) or 'none'})")


def format_ruler(summary: Summary) -> str:
    """RULER_RULE and what it rests on."""
    ruler = summary["effective_lengths"]["ruler"]
    means = ", ".join(f"{format_length(int(length))} {format_rate(entry)}"
                      for length, entry in ruler["lengths"].items())
    return (f"{reached(ruler)} (mean over {len(ruler['tasks'])} of RULER's {ruler['of']} tasks: "
            f"{means or 'no length was asked of all'}; by the lower ends of the intervals "
            f"{format_length(ruler['length_low']) or 'none'})")


def format_check(check: Mapping[str, Any]) -> str:
    """A streaming grid against prompts with one fact."""
    cells = "1 cell" if check["cells"] == 1 else f"{check['cells']} cells"
    return (f"{format_rate(check['single'])} with one fact a prompt, "
            f"{format_rate(check['stream'])} in the stream, at the same {cells}")


def format_slope(entry: Mapping[str, Any]) -> str:
    """What each doubling of the context changes in the loss."""
    slope, error = entry.get("slope_per_doubling"), entry.get("slope_stderr")
    text = f"{entry['loss']:.4f} nats a token"
    if slope is None:
        return text
    spread = "" if error is None else f" +/- {error:.4f}"
    what = "" if entry.get("short") is None else (
        f", {entry['excess']:+.4f} over windows of {format_length(entry['short'])}, which grows by")
    return f"{text}{what or ','} {slope:+.4f}{spread} each time the position doubles"


def format_divergence(entry: Mapping[str, Any]) -> str:
    """How far a model's next-token distribution is from another's."""
    spread = "" if entry.get("kl_stderr") is None else f" +/- {entry['kl_stderr']:.4f}"
    agreed = "" if entry.get("agreement") is None else (
        f", the same first choice at {100 * entry['agreement']:.2f} % of {entry['tokens']} tokens")
    return f"KL {entry['kl']:.4f}{spread} nats a token{agreed}"
