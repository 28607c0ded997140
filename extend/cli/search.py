"""The subcommand that searches a RoPE on the user's own model."""

import json
import shlex
from pathlib import Path

import click

from extend.cli.group import main, out_option, overwrite_option, reporting
from extend.cli.types import LENGTH, Choice, ListType


@main.command()
@click.argument("model")
@click.option("--to", required=True, type=LENGTH, help="Target length in tokens: 32768 or 32k.")
@click.option("--text", required=True, metavar="PATH",
              help="Text like what the model will read; half of it checks what was found.")
@click.option("--siblings", type=ListType(), default="", metavar="DIR,DIR",
              help="Fine-tunes that the setting should leave alone.")
@click.option("--sibling-text", type=ListType(), default="", metavar="PATH,PATH",
              help="Their text: one for each, or one for all; --text unless given.")
@click.option("--budget", type=int, default=80, show_default=True, help="Most evaluations.")
@click.option("--merge-safe", is_flag=True,
              help="Look longer for settings that leave siblings alone; rope.json is then one.")
@click.option("--reach", type=float, default=None, metavar="NATS",
              help="Needle loss that counts as reaching the target.")
@click.option("--rows", type=int, default=None, help="Rows with hidden facts, for each length.")
@click.option("--needles", type=int, default=None, help="Facts in a row; 16, or 1 if it must be.")
@click.option("--short-tokens", type=int, default=98304, show_default=True,
              help="Native-length text read for each candidate.")
@click.option("--sibling-tokens", type=int, default=32768, show_default=True,
              help="Text that each sibling reads for each candidate.")
@click.option("--drift", type=float, default=0.005, show_default=True,
              help="Without siblings: relative size of the random deltas that stand in for them.")
@click.option("--sliding-window", type=Choice(["refuse", "keep"]), default="refuse",
              show_default=True, help="What to do with a window shorter than the target.")
@click.option("--seed", type=int, default=0, show_default=True)
@out_option
@overwrite_option
@reporting
def search(model, to, text, siblings, sibling_text, budget, merge_safe, reach, rows, needles,
           short_tokens, sibling_tokens, drift, sliding_window, seed, out, overwrite):
    """Find the RoPE for a longer context that suits MODEL, without training.

    Measures the analytic methods, other thetas and per-pair curves on the model itself: facts found
    at the target length, loss on short text, and how much fine-tunes are disturbed.

    \b
    extend search ./llama --to 32k --text ./books --out ./search
    extend search ./llama --to 32k --text ./books --siblings ./chat,./code --merge-safe --out ./safe
    """
    from extend.search import search as stage

    path = stage(model, out, target_len=to, text=text, siblings=siblings,
                 sibling_text=sibling_text, budget=budget, merge_safe=merge_safe, reach=reach,
                 rows=rows, needles=needles, short_tokens=short_tokens,
                 sibling_tokens=sibling_tokens, drift=drift, sliding_window=sliding_window,
                 seed=seed, overwrite=overwrite)
    found = json.loads(path.read_text(encoding="utf-8"))
    results = {"output": str(path), **{key: found[key] for key in (
        "chosen", "verdict", "gain", "evaluations_used")}}
    return results, _tell(path, found, "merge-safe" if merge_safe else "compromise")


def _tell(path: Path, found: dict, best: str) -> str:
    """The table, what the chosen settings gain, and how to use them."""
    lines = [path.with_name("table.txt").read_text(encoding="utf-8"),
             *_not_reached(found["reached"]),
             "at least as good on needle and short loss, of so many other analytic methods:"]
    lines += [_count(name, found["verdict"]) for name in found["chosen"]]
    split = list(found["verdict"])[-1]
    choice = found["gain"]["analytic_choice"]
    behind = found["clusters"][split]
    lines += ["", f"against {choice}, the analytic method with the least needle loss ({split}, "
              f"95 % interval of the difference, from {behind['needle']} rows with hidden facts, "
              f"{behind['short']} windows of short text, {behind['siblings']} of a sibling's):"]
    lines += [f"  {name:<12}" + (_differences(gain) if found["chosen"][name]["name"] != choice
                                 else "is that method")
              for name, gain in found["gain"][split].items()]
    lines += ["", f"{found['evaluations_used']} of {found['budget']} evaluations; to use the "
              f"{best} setting:",
              f"extend rescale {shlex.quote(found['model'])} "
              f"{found['chosen'][best]['command_options']} "
              "--out DIR", "", str(path)]
    return "\n".join(lines)


def _differences(gain: dict) -> str:
    return ", ".join(f"{axis} {d['mean']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f})"
                     for axis, d in gain.items())


def _not_reached(reached: dict) -> list[str]:
    if reached["any"]:
        return []
    return [f"No setting reaches the target: the least needle loss is "
            f"{reached['least_needle_loss']:.3f} nats a token, above {reached['limit']:g}. What is "
            "chosen below is only the least bad; train, try a shorter target, or another model.",
            ""]


def _count(name: str, verdicts: dict) -> str:
    told = [f"{split} {verdict[name]['matched']} of {verdict[name]['others']} "
            f"(not surely worse than {verdict[name]['not_surely_worse']})"
            for split, verdict in verdicts.items() if name in verdict]
    return f"  {name:<12}" + ", ".join(told)
