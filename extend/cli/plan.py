"""`extend plan`: what a longer context, or a whole recipe, would take, before anything runs."""

import click

from extend.cli.group import main, overwrite_option, reporting, set_option
from extend.cli.types import LENGTH, ListType, NameType, parse_labels, parse_pairs
from extend.rope.methods import METHODS

# Keys of `extend.capacity.GPUS`, which would take long to load for a line of help; a test keeps
# the two alike.
GPU_NAMES = ("h200", "h100", "h800", "a100", "b200")
TRAINED = ("all", "lora", "lora+")
WEIGHT_DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "adamw-8bit", "adamw-offload")


@main.command()
@click.argument("model", required=False, metavar="MODEL|RECIPE")
@click.option("--to", type=LENGTH, default=None,
              help="Target length in tokens; the last of --schedule unless given.")
@click.option("--head-dim", type=int, default=None, metavar="D",
              help="In place of a model, with --theta and --from: rotated channels per head.")
@click.option("--theta", type=float, default=None, metavar="T", help="Its rope_theta.")
@click.option("--from", "from_len", type=LENGTH, default=None,
              help="Its native length. With a model that is extended already: start again from "
                   "plain RoPE at this length.")
@click.option("--method", type=NameType(METHODS), default=None,
              help="Show this method pair by pair, and use it for --schedule (there critical "
                   f"unless given): {', '.join(METHODS)}.")
@click.option("-o", "--option", multiple=True, metavar="KEY=VALUE", help="Option of --method.")
@click.option("--schedule", type=ListType(LENGTH), default="", metavar="LENGTHS",
              help="Lengths of training stages, 32k,128k,1m: show theta for each.")
@click.option("--gpus", type=click.IntRange(min=1), default=None, metavar="N",
              help="Plan training on so many GPUs, of all hosts together.")
@click.option("--gpu", type=NameType(GPU_NAMES), default="h200",
              help=f"Their kind: {', '.join(GPU_NAMES)} (h200 unless given).")
@click.option("--gpu-memory", type=float, default=None, metavar="GIB",
              help="Memory of a GPU; that of its kind unless given.")
@click.option("--host-memory", type=float, default=0.0, metavar="GIB",
              help="Memory of a host that training may use.")
@click.option("--hosts", type=click.IntRange(min=1), default=1, metavar="N",
              help="Hosts that the GPUs are spread over (1 unless given).")
@click.option("--rows", type=click.IntRange(min=1), default=None, metavar="N",
              help="Rows of an optimizer step; as many as are fastest unless given.")
@click.option("--trained", type=NameType(TRAINED), default="all",
              help="What is trained: all weights, lora (adapters), or lora+ (adapters, norms and "
                   "embeddings); all unless given.")
@click.option("--weight-dtype", type=NameType(WEIGHT_DTYPES), default="float32",
              help=f"In which weights are kept: {' or '.join(WEIGHT_DTYPES)} (float32 unless "
                   "given).")
@click.option("--optimizer", type=NameType(OPTIMIZERS), default="adamw",
              help=f"{', '.join(OPTIMIZERS)} (adamw unless given).")
@set_option
@click.option("--run", "run_dir", default=None, metavar="DIR",
              help="With RECIPE: the --out of `extend run`. What is done there is skipped, and its "
                   "disk is looked at.")
@click.option("--config", multiple=True, metavar="INPUT=FILE",
              help="With RECIPE: config.json of a model that is not here, by what the recipe calls "
                   "it.")
@click.option("--out", default=None, metavar="DIR",
              help="With MODEL: write plan.json and frequencies.png there.")
@overwrite_option
@reporting
@click.pass_context
def plan(context, model, to, head_dim, theta, from_len, method, option, schedule, gpus, gpu,
         gpu_memory, host_memory, hosts, rows, trained, weight_dtype, optimizer, overrides,
         run_dir, config, out, overwrite):
    """Compare the RoPE methods that could take MODEL to a length; no weights are read.

    MODEL is a checkpoint directory or a config.json. With --gpus, also choose how training at that
    length is laid out on them: what a recipe must say, memory at the peak, seconds of a step; where
    it does not fit, by how much, and what would.

    Of a RECIPE (a YAML file) tell what every stage reads and writes and how long it takes, memory,
    disk and downloads: on --gpus, or the GPUs of this machine. Nothing is written or downloaded but
    the config.json of models on the Hub.

    \b
    extend plan ./llama --to 128k
    extend plan ./llama --to 128k --method yarn -o beta_fast=16
    extend plan ./llama --schedule 32k,128k,1m --out ./plan
    extend plan ./llama --to 1m --gpus 8 --gpu h200 --host-memory 1000
    extend plan ./llama --to 64k --gpus 2 --gpu h100 --weight-dtype bfloat16 --json
    extend plan --head-dim 128 --theta 500000 --from 8k --to 1m --json
    extend plan my.yaml --gpus 8 --gpu h200
    extend plan my.yaml --set long.schedule.0.batch_rows=16 --gpus 8
    extend plan my.yaml --run runs/mine --json
    """
    if model is not None and model.endswith((".yaml", ".yml")):
        _check_recipe_usage(context)
        return _plan_recipe(model, overrides, run_dir, config, {
            "gpus": gpus, "gpu": gpu, "gpu_memory": gpu_memory, "host_memory": host_memory,
            "hosts": hosts})
    if run_dir is not None or config or overrides:
        raise click.UsageError("--run, --config and --set belong to a recipe, a file called "
                               "*.yaml")
    from extend.plan import plan as stage
    from extend.plan import write_plan
    from extend.plan.capacity import capacity_tables
    from extend.plan.report import methods_table, pairs_table, schedule_table
    from extend.plan.rope import DEFAULT_METHOD

    _check_usage(model, to, (head_dim, theta, from_len), method, option, schedule)
    machine = None if gpus is None else {
        "gpus": gpus, "gpu": gpu, "hosts": hosts, "rows": rows, "trained": trained,
        "gpu_memory": None if gpu_memory is None else int(gpu_memory * 2**30),
        "host_memory": int(host_memory * 2**30), "weight_dtype": weight_dtype,
        "optimizer": optimizer}
    found = stage(model, target_len=to or schedule[-1], head_dim=head_dim, rope_theta=theta,
                  from_len=from_len, method=method or DEFAULT_METHOD, options=parse_pairs(option),
                  schedule=schedule, machine=machine)
    results = found.to_json()
    tables = [methods_table(found.rope)]
    if method:
        tables.append(pairs_table(found.rope))
    if schedule:
        tables.append(schedule_table(found.rope))
    if found.capacity is not None:
        tables.append(capacity_tables(found.capacity))
    tables += found.notes
    if out:
        results["output"] = str(write_plan(found, out, overwrite=overwrite))
        tables.append(results["output"])
    return results, "\n\n".join(tables)


_OF_MODELS = ("to", "head_dim", "theta", "from_len", "method", "option", "schedule", "rows",
              "trained", "weight_dtype", "optimizer", "out", "overwrite")


def _check_recipe_usage(context):
    given = [option.opts[-1] for option in context.command.params if option.name in _OF_MODELS
             and context.get_parameter_source(option.name) is not
             click.core.ParameterSource.DEFAULT]
    if given:
        raise click.UsageError(f"with a recipe, which says it itself, leave out {', '.join(given)}")


def _plan_recipe(recipe, overrides, run_dir, config, given):
    from extend.capacity import GIB, Machine, gpu_rates
    from extend.recipe_plan import plan_json, plan_recipe, plan_text

    memory = given["gpu_memory"] or gpu_rates(given["gpu"]).memory_gib
    machine = None if given["gpus"] is None else Machine(
        gpu=given["gpu"], num_gpus=given["gpus"], hosts=given["hosts"],
        gpu_memory_bytes=int(memory * GIB), host_memory_bytes=int(given["host_memory"] * GIB))
    found = plan_recipe(recipe, run_dir=run_dir, machine=machine, overrides=overrides,
                        configs=parse_labels(config, "--config"))
    return plan_json(found), plan_text(found)


def _check_usage(model, to, numbers, method, option, schedule):
    if model is None and None in numbers:
        raise click.UsageError("give MODEL, or --head-dim, --theta and --from together")
    if model is not None and numbers[:2] != (None, None):
        raise click.UsageError("--head-dim and --theta take the place of MODEL; leave one out")
    if to is None and not schedule:
        raise click.UsageError("give --to LENGTH, or --schedule")
    if option and method is None:
        raise click.UsageError("--option belongs to a --method; give that too")
