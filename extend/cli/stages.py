"""The stages that change a model, and `run`, which does all that a recipe asks for."""

from pathlib import Path

import click

from extend.cli.group import (
    main,
    out_option,
    overwrite_option,
    recipe_argument,
    reporting,
    set_option,
)
from extend.cli.types import DTYPE, LENGTH, Choice, NameType, OpenName, parse_numbers, parse_pairs
from extend.rope.methods import METHODS

_NOT_OPTIONS = ("model", "out", "target_len", "method", "sliding_window", "overwrite", "from_len")


def _merge_methods() -> list[str]:
    from extend.merge.methods import METHODS as MERGE_METHODS

    return list(MERGE_METHODS)


@main.command()
@click.argument("model")
@click.option("--to", required=True, type=LENGTH, help="Target length in tokens: 131072 or 128k.")
@click.option("--method", type=NameType(METHODS), default="critical", show_default=True,
              help=f"RoPE method: {', '.join(METHODS)}.")
@click.option("-o", "--option", multiple=True, metavar="KEY=VALUE",
              help="Option of the method; resonance=true goes with any.")
@click.option("--from", "from_len", type=LENGTH, default=None, metavar="LENGTH",
              help="For a model that is extended already: start again from plain RoPE at this "
                   "native length.")
@click.option("--sliding-window", type=Choice(["refuse", "drop", "keep"]), default="refuse",
              show_default=True, help="What to do with a window shorter than the target.")
@out_option
@overwrite_option
@reporting
def rescale(model, to, method, option, from_len, sliding_window, out, overwrite):
    """Write MODEL with a RoPE made for a longer context; the weights stay the same.

    \b
    extend rescale ./llama --to 128k --method ntk-by-parts --out ./llama-128k-init
    extend rescale ./llama --to 64k --method theta -o rope_theta=8e6 --out ./llama-64k-init
    """
    from extend.rope import rescale as stage

    path = stage(model, out, target_len=to, method=method, sliding_window=sliding_window,
                 overwrite=overwrite, from_len=from_len, **parse_pairs(option, _NOT_OPTIONS))
    return {"output": str(path)}


@main.command()
@recipe_argument
@set_option
@click.option("--stage", default=None, help="Name of the train stage, if the recipe has several.")
@click.option("--nproc", type=int, default=None, help="Processes to start; one per GPU by default.")
@out_option
@overwrite_option
@reporting
def train(recipe, overrides, stage, nproc, out, overwrite):
    """Run the train stage of RECIPE.

    \b
    extend train my.yaml --out runs/long --nproc 2
    extend train my.yaml --set long.schedule.0.steps=2 --out runs/try
    torchrun --nproc_per_node 2 -m extend train my.yaml --out runs/long
    """
    from extend.together import failing_together

    with failing_together():
        return {"output": str(_train(recipe, overrides, stage, nproc, Path(out),
                                     overwrite))}


def _train(recipe, overrides, stage, nproc, out, overwrite):
    from extend.errors import RecipeError
    from extend.options import resolve_inputs
    from extend.recipe import load_recipe
    from extend.recipe_inputs import input_path
    from extend.train import train as run_stage

    loaded = load_recipe(recipe, overrides=overrides)
    found = [s for s in loaded.stages if s.kind == "train" and stage in (None, s.name)]
    if len(found) != 1:
        names = ", ".join(s.name for s in loaded.stages if s.kind == "train") or "none"
        raise RecipeError(f"{recipe}: {len(found)} train stages fit, one is needed; it has "
                          f"{names}; choose with --stage")
    names = {s.name for s in loaded.stages}

    def resolve(value: str) -> str:
        if value in names:
            raise RecipeError(f"{recipe}: {found[0].name} needs the output of stage {value!r}; "
                              "use `extend run`, or give a path")
        return input_path(loaded, value)

    options = resolve_inputs(found[0].options, resolve)
    return run_stage(options, out, nproc=nproc, overwrite=overwrite)


@main.command()
@click.option("--base", required=True, metavar="DIR", help="The model before.")
@click.option("--tuned", required=True, metavar="DIR", help="The model after.")
@click.option("--rank", type=int, default=None,
              help="Rank of every matrix. Without one, each keeps what stands out of the rounding "
                   "of the stored weights: at most 512, or 32 where TUNED is stored in fp32.")
@click.option("--energy", type=float, default=None, help="Keep this share of each squared norm.")
@click.option("--bytes", "adapter_bytes", type=int, default=None, metavar="N",
              help="Largest size of the adapter file, spent where it holds most.")
@click.option("--exact", is_flag=True, help="Decompose exactly, not from random sketches.")
@click.option("--no-embeddings", is_flag=True, help="Leave embedding deltas out of the sidecar.")
@click.option("--fold-norms", is_flag=True,
              help="Carry norm deltas inside the matrices after them, for servers that take LoRA "
                   "matrices alone.")
@click.option("--dtype", type=DTYPE,
              default="float32",
              show_default=True, help="Dtype of the factors.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="auto", show_default=True,
              help="cpu, cuda, a list such as cuda:0,cuda:1, or auto: every GPU there is.")
@out_option
@overwrite_option
@reporting
def extract(base, tuned, rank, energy, adapter_bytes, exact, no_embeddings, fold_norms, dtype, seed,
            device, out, overwrite):
    """Write tuned - base as a PEFT LoRA adapter and a sidecar for what a LoRA cannot carry.

    \b
    extend extract --base ./llama --tuned ./llama-128k --rank 32 --out ./adapter
    """
    from extend.checkpoint import reading_ahead
    from extend.inputs import local_path

    base, tuned = local_path(base), local_path(tuned)
    with reading_ahead(base, tuned):
        from extend.adapter import extract as stage

    path = stage(base, tuned, out, rank=rank, energy=energy, adapter_bytes=adapter_bytes,
                 exact=exact, embeddings=not no_embeddings, fold_norms=fold_norms,
                 dtype=dtype, seed=seed, device=device, overwrite=overwrite)
    return {"output": str(path)}


@main.command()
@click.option("--adapter", multiple=True, metavar="DIR",
              help="An adapter of `extend extract`, PEFT or mergekit; again for another one.")
@click.option("--tuned", metavar="DIR", default=None,
              help="A long model; TUNED - BASE is added, with no adapter between.")
@click.option("--base", metavar="DIR", default=None,
              help="The model that all started from: for --tuned, for methods that look at what "
                   "the target changed, and for mergekit's adapters.")
@click.option("--target", required=True, metavar="DIR", help="A fine-tune of the same base.")
@click.option("--weight", type=float, multiple=True,
              help="Factor of the deltas, 1 by default; or one for each adapter, in order, and "
                   "then one for TUNED - BASE.")
@click.option("--method", type=OpenName(_merge_methods), default="add", show_default=True,
              metavar="NAME",
              help="How a delta is fitted to the target: add, drift-aware, orthogonal; or one of "
                   "mergekit's, such as mergekit:ties, mergekit:della, mergekit:slerp.")
@click.option("-o", "--option", multiple=True, metavar="KEY=VALUE",
              help="Option of the method; of mergekit's also for one model, as in "
                   "target.density=1, and seed=7.")
@click.option("--layer-weights", metavar="FILE|LIST", default=None,
              help="Factors of single parameters: a JSON file, or numbers laid over the layers, "
                   "as in 0,0.5,1.")
@click.option("--no-sidecar", is_flag=True, help="Apply the LoRA matrices and the RoPE only.")
@click.option("--rope-from", metavar="DIR", default=None,
              help="Long model to take the RoPE from, for an adapter without a sidecar.")
@click.option("--dtype", type=DTYPE, default=None,
              help="Dtype of the output; the target's by default.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
@click.option("--dry-run", is_flag=True,
              help="Read headers and configs only; list every problem, or what would be written.")
@out_option
@overwrite_option
@reporting
def merge(adapter, target, weight, option, layer_weights, no_sidecar, device, dry_run, out,
          **options):
    """Add adapters to a fine-tune of the same base; write a long-context checkpoint.

    \b
    extend merge --adapter ./adapter --target ./my-finetune --out ./my-finetune-128k
    extend merge --base ./llama --tuned ./llama-128k --target ./my-finetune \\
        --method orthogonal -o rank=16 --out ./my-finetune-128k
    extend merge --base ./llama --adapter ./adapter --target ./my-finetune \\
        --method mergekit:ties -o density=0.5 -o target.density=1 --out ./my-finetune-128k
    """
    from extend.checkpoint import reading_ahead
    from extend.inputs import local_path

    target, options["base"], options["tuned"] = (
        path and local_path(path) for path in (target, options["base"], options["tuned"]))
    with reading_ahead(*([] if dry_run else [target, options["base"], options["tuned"]])):
        from extend.merge import merge as stage
        from extend.merge import preview

    options |= {"weight": list(weight) or 1.0, "sidecar": not no_sidecar,
                "options": parse_pairs(option),
                "layer_weights": parse_numbers(layer_weights)}
    if dry_run:
        found = preview(list(adapter), target, out, **options)
        found.raise_if_any()
        return found.to_json(), found.text()
    return {"output": str(stage(list(adapter), target, out, device=device, **options))}


@main.command()
@recipe_argument
@set_option
@click.option("--dry-run", is_flag=True,
              help="Say which stages would run, and which are skipped and why; write nothing.")
@out_option
@reporting
def run(recipe, overrides, dry_run, out):
    """Run every stage of RECIPE in order; what is done is skipped, what was interrupted resumes.

    \b
    extend run demo.yaml --out runs/demo
    extend run demo.yaml --set seed=1 --set adapter.rank=8 --out runs/demo-8
    extend run demo.yaml --out runs/demo --dry-run
    extend plan demo.yaml --run runs/demo   # also time, memory and disk
    """
    from extend.decisions import decide
    from extend.run import run as run_recipe

    if not dry_run:
        return {"output": str(run_recipe(recipe, out, overrides=overrides))}
    found = decide(recipe, out, overrides=overrides)
    lines = [f"[{number}/{len(found)}] {one.stage.name} ({one.stage.kind}): {one.action}"
             + f", {one.reason}" * bool(one.reason) for number, one in enumerate(found, start=1)]
    return {"stages": [{"name": one.stage.name, "stage": one.stage.kind, "action": one.action,
                        "reason": one.reason} for one in found]}, "\n".join(lines)


@main.command("run-page")
@click.argument("directory", metavar="DIR")
@reporting
def run_page(directory):
    """Write index.html, the page of a run, again: from what lies in DIR, the --out of `extend run`.

    `extend run` does so after every stage. The page is one file that loads nothing, and tells the
    whole story of the run: RoPE, stages, training, evaluations side by side, adapter, merge, what
    failed and what is missing.

    \b
    extend run-page runs/demo
    """
    from extend.run_page import write_run_page

    return {"output": str(write_run_page(directory))}
