"""The stages that measure models: `eval` and `report`."""

import json
from pathlib import Path

import click

from extend.cli.group import main, out_option, overwrite_option, reporting, say
from extend.cli.types import LENGTH, Choice, ListType, parse_labels, parse_pairs


def _task_names() -> list[str]:
    from extend.evaluate.tasks import GROUPS, TASKS

    return [*TASKS, *GROUPS]


def _list_tasks(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print every task with its first sentence and its options, and end."""
    from extend.evaluate.tasks import GROUPS, TASKS
    from extend.registry import option_names

    if not value or ctx.resilient_parsing:
        return
    tasks = {name: {"about": " ".join((task.__doc__ or "").split("\n\n")[0].split()),
                    "options": list(option_names(task))} for name, task in TASKS.items()}
    lines = [f"{name}\n    {told['about']}" + (f"\n    options: {', '.join(told['options'])}"
                                              if told["options"] else "")
             for name, told in tasks.items()]
    lines += [f"{name}\n    stands for {', '.join(members)}" for name, members in GROUPS.items()]
    say({"tasks": tasks, "groups": GROUPS}, "\n".join(lines), as_json=bool(ctx.obj))
    ctx.exit()


@main.command("eval")
@click.argument("model")
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list_tasks,
              help="List the tasks and their options.")
@click.option("--tasks", type=ListType(names=_task_names), default="passkey", show_default=True,
              help="Names separated by commas; `extend eval --list` shows all.")
@click.option("--lengths", type=ListType(LENGTH), default="", help="Lengths: 4k,8k,128k.")
@click.option("--depths", type=int, default=10, show_default=True, help="Depths from 0 to 1.")
@click.option("--trials", type=int, default=5, show_default=True, help="Trials of each cell.")
@click.option("--haystack", metavar="PATH", help="Text to hide facts in, for tasks that take it.")
@click.option("--file", metavar="PATH", help="Prompts and answers, JSON lines (exact-match).")
@click.option("--text", metavar="PATH", help="Held-out text, for losses.")
@click.option("-o", "--option", multiple=True, metavar="KEY=VALUE",
              help="Option of every task that has it, or TASK.KEY=VALUE of one.")
@click.option("--adapter", metavar="DIR", default=None, help="Adapter to add to MODEL first.")
@click.option("--base", metavar="DIR", default=None,
              help="MODEL before its context was extended: asked too, at its native length.")
@click.option("--template", type=Choice(["auto", "base", "chat"]), default="auto",
              show_default=True, help="chat puts prompts into MODEL's chat template.")
@click.option("--thinking", type=int, default=0, show_default=True, metavar="N",
              help="Tokens that a thinking model may think before it answers (template chat).")
@click.option("--chunk", type=LENGTH, default=None, help="Most tokens in one forward.")
@click.option("--nproc", type=int, default=1, show_default=True, help="Processes, one per GPU.")
@click.option("--context-parallel", type=int, default=1, show_default=True,
              help="Processes, one per GPU, that share every row.")
@click.option("--server", metavar="URL", default=None,
              help="Ask an OpenAI-compatible server; MODEL gives tokenizer and config.")
@click.option("--server-option", multiple=True, metavar="KEY=VALUE",
              help="How to ask it: model, prompt (ids or text), scoring (generate or echo), "
                   "concurrency, slack, key_variable, timeout_seconds, retries.")
@click.option("--seed", type=int, default=0, show_default=True)
@out_option
@overwrite_option
@reporting
def evaluate(model, tasks, haystack, file, text, option, server, server_option, out, **options):
    """Score MODEL on a grid of lengths and depths; write results.json.

    \b
    extend eval ./llama-128k --tasks passkey --lengths 8k,32k,128k --out ./results
    extend eval ./llama-128k --tasks passkey-text --haystack ./books --lengths 32k --out ./real
    extend eval ./llama-1m --tasks passkey-stream --lengths 128k,512k,1m --context-parallel 8 \\
        --out ./grid
    extend eval ./llama-128k --server http://localhost:8000 --lengths 128k --out ./served
    """
    from extend.errors import RecipeError
    from extend.evaluate import evaluate as stage
    from extend.evaluate.plan import spread_options

    given = {"haystack": haystack, "file": file, "text": text}
    specs = spread_options(tasks, {**{key: value for key, value in given.items() if value},
                                   **parse_pairs(option)})
    if server_option and server is None:
        raise RecipeError("--server-option is given without --server; give the server's address")
    asked = None if server is None else {"url": server, **parse_pairs(server_option)}
    path = stage(model, out, tasks=specs, server=asked, **options)
    return {"output": str(path), **json.loads(Path(path).read_text())["summary"]}


@main.command()
@click.argument("results", nargs=-1, required=True, metavar="LABEL=RESULTS...")
@click.option("--title", default="", help="Title of the page.")
@out_option
@overwrite_option
@reporting
def report(results, title, out, overwrite):
    """Write an HTML page, heat maps and a table that compare the RESULTS of several models.

    \b
    extend report base=runs/eval-base long=runs/eval-long --out ./report
    """
    from extend.evaluate import report as stage

    labelled = parse_labels(results, "report")
    return {"output": str(stage(labelled, out, title=title, overwrite=overwrite))}
