"""What is chosen fits, and nothing faster does; what does not fit says what would."""

from dataclasses import replace
from pathlib import Path

import pytest

from extend.capacity import (
    GIB,
    Machine,
    Wish,
    choose_plan,
    choose_recomputed_layers,
    model_shape,
    phase_setup,
    plan_memory,
    plan_time,
)
from extend.capacity.planner import USABLE_FRAC, _setups
from extend.capacity.rates import GPUS, gpu_rates
from extend.errors import RecipeError
from extend.model_config import parse_config
from extend.train_options import TrainOptions

LLAMA_8B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 5e5}
CONFIG = parse_config(LLAMA_8B, Path("config.json"))
SHAPE = model_shape(CONFIG)
DEVICE = int(139.8 * GIB)


def machine(gpus: int, host_gib: int = 0, hosts: int = 1) -> Machine:
    return Machine(gpu="h200", num_gpus=gpus, hosts=hosts, gpu_memory_bytes=DEVICE,
                   host_memory_bytes=host_gib * GIB)


def needed(setup) -> float:
    found = plan_memory(SHAPE, setup)
    return found.device_bytes + found.outside_bytes


@pytest.mark.parametrize("length,gpus,rows", [(65536, 2, 1), (65536, 4, None), (8192, 4, 4)])
def test_nothing_faster_fits(length, gpus, rows):
    """Against every setup with every number of recomputed layers, one by one."""
    wish = Wish(length=length, batch_rows=rows, weight_bytes=2)
    found = choose_plan(SHAPE, machine(gpus), wish)
    assert found.fits and found.needed_bytes <= USABLE_FRAC * DEVICE
    fitting = [setup.with_recomputed(layers)
               for setup in _setups(SHAPE, machine(gpus), wish, {}) for layers in range(33)]
    fitting = [setup for setup in fitting if needed(setup) <= USABLE_FRAC * DEVICE]
    fastest = max(plan_time(SHAPE, setup, machine(gpus), GPUS["h200"]).tokens_per_second
                  for setup in fitting)
    assert found.time.tokens_per_second == pytest.approx(fastest)


def test_what_does_not_fit_says_what_would():
    found = choose_plan(SHAPE, machine(1), Wish(length=1 << 20))
    assert not found.fits and found.needed_bytes > found.usable_bytes
    length, gpus = found.nearest["length"], found.nearest["gpus"]
    assert choose_plan(SHAPE, machine(1), Wish(length=length)).fits
    assert not choose_plan(SHAPE, machine(1), Wish(length=length + 1024)).fits
    assert choose_plan(SHAPE, machine(gpus), Wish(length=1 << 20, batch_rows=1)).fits
    assert not choose_plan(SHAPE, machine(gpus // 2), Wish(length=1 << 20, batch_rows=1)).fits


def test_host_memory_is_shared_by_the_processes_of_a_host():
    small, large = (choose_plan(SHAPE, machine(2, host), Wish(length=1 << 19, weight_bytes=2))
                    for host in (0, 150))
    assert small.host_bytes == 0
    assert 0 < large.host_bytes <= 0.9 * 150 * GIB
    assert large.time.seconds < small.time.seconds or not small.fits


def test_a_length_that_no_layout_divides():
    with pytest.raises(RecipeError, match="do not divide over 3 GPUs"):
        choose_plan(SHAPE, machine(3), Wish(length=1000, batch_rows=1))


def test_gpus_that_do_not_divide_over_hosts():
    with pytest.raises(RecipeError, match="3 GPUs in 2 hosts"):
        machine(3, hosts=2)
    with pytest.raises(RecipeError, match="h2000"):
        gpu_rates("h2000")


def options(**changes) -> TrainOptions:
    phases = changes.pop("schedule", [{"length": 65536, "steps": 1, "lr": 1e-5}])
    return TrainOptions(**{"model": ".", "data": [{"kind": "retrieval"}], "schedule": phases,
                           "weight_dtype": "bfloat16"} | changes)


def test_as_few_layers_as_fit_are_computed_again():
    found = choose_recomputed_layers(CONFIG, options(), world=2, device_bytes=DEVICE)
    setup = phase_setup(options(), options().schedule[0], world=2)
    assert needed(setup.with_recomputed(found)) <= USABLE_FRAC * DEVICE
    assert needed(setup.with_recomputed(found - 1)) > USABLE_FRAC * DEVICE


def test_the_largest_phase_decides():
    short = {"length": 16384, "steps": 1, "lr": 1e-5}
    both = options(schedule=[short, {"length": 131072, "steps": 1, "lr": 1e-5}])
    alone = options(schedule=both.schedule[1:])
    found = [choose_recomputed_layers(CONFIG, each, world=2, device_bytes=DEVICE)
             for each in (options(schedule=[short]), alone, both)]
    assert found[0] == 0 < found[1] == found[2]


def test_all_layers_where_nothing_fits():
    assert choose_recomputed_layers(CONFIG, options(), world=1, device_bytes=8 * GIB) == 32


def test_setup_of_options():
    phase = {"length": 32768, "steps": 1, "lr": 1e-5, "batch_rows": 4}
    given = options(schedule=[phase], tensor_parallel=2, shard_over=4, host_memory="100GiB",
                    recomputed_layers=7, kept_attention=3, mode="lora", lora_rank=8,
                    trained_beside=["norms"], optimizer="adamw-8bit")
    setup = phase_setup(given, given.schedule[0], world=32, hosts=4)
    assert (setup.dp, setup.cp, setup.tp, setup.replicas, setup.shards) == (4, 4, 2, 4, 4)
    assert (setup.recomputed, setup.kept_attention, setup.trained) == (7, 3, "lora+")
    assert setup.host_share_bytes == 100 * GIB // 8
    assert setup.tokens == 8192 and setup.micro_steps == 1


def test_more_rows_than_fit_side_by_side_follow_one_another():
    """Sixteen rows of 1M on eight GPUs: two for each would be far too many, one over all fits."""
    found = choose_plan(SHAPE, machine(8, 1000), Wish(length=2**20, batch_rows=16))
    assert found.fits and (found.setup.dp, found.setup.cp, found.setup.micro_steps) == (1, 8, 16)
    keys = found.recipe()
    assert keys["schedule"] == [{"length": 2**20, "batch_rows": 16, "context_parallel": 8}]
    phases = [phase | {"steps": 1, "lr": 1e-5} for phase in keys.pop("schedule")]
    again = TrainOptions(model=".", data=[{"kind": "retrieval"}], schedule=phases, **keys)
    setup = phase_setup(again, again.schedule[0], world=8)
    assert (setup.dp, setup.cp, setup.micro_steps) == (1, 8, 16)


@pytest.mark.parametrize("change", [{"tp": 2}, {"cp": 4}, {"recomputed": 32}, {"tile": 4096},
                                    {"trained": "lora"}, {"optimizer": "adamw-8bit"},
                                    {"optimizer": "adamw-offload"}, {"host_bytes": 50 * GIB}],
                         ids=str)
def test_what_should_save_memory_does(change):
    base = phase_setup(options(recomputed_layers=16), options().schedule[0], world=2)
    base = replace(base, tile=None)
    assert needed(replace(base, **change)) < needed(base)


def test_short_rows_of_a_small_model_wait_for_their_launches():
    small = model_shape(parse_config(LLAMA_8B | {"hidden_size": 576, "intermediate_size": 1536,
                                                 "num_attention_heads": 9, "num_key_value_heads": 3,
                                                 "num_hidden_layers": 30}, Path("config.json")))
    options = TrainOptions(model="m", data=[{"kind": "retrieval"}], recomputed_layers=0, schedule=[
        {"length": 1024, "steps": 1, "batch_rows": 8, "lr": 1e-4},
        {"length": 131072, "steps": 1, "lr": 1e-4}])
    short, long = (plan_time(small, phase_setup(options, phase, world=1), machine(1),
                             gpu_rates("h200")) for phase in options.schedule)
    assert 30 * 6e-3 <= short.seconds < 30 * 7e-3 and short.spread > 0.4
    assert "launches" not in long.parts and long.spread <= 0.3


def test_distilled_rows_cost_a_forward_more():
    source = {"kind": "text", "path": "p", "document_length": 2048}
    def planned(**changes):
        options = TrainOptions(model="m", data=[source | {"distill": True}, source],
                               recomputed_layers=0, schedule=[
                                   {"length": 131072, "steps": 1, "lr": 1e-4} | changes])
        setup = phase_setup(options, options.schedule[0], world=8)
        return plan_time(SHAPE, setup, machine(8), gpu_rates("h200")).parts

    none, half, all_rows = (planned(mix=mix).get("teacher", 0.0)
                            for mix in ({1: 1}, {0: 1, 1: 1}, {0: 1}))
    assert none == 0 and half == pytest.approx(all_rows / 2)
    # A third of what matrices take in a step, and what a forward moves; the head is not counted.
    assert 0.3 < all_rows / planned(mix={0: 1})["matrix products"] < 0.5
