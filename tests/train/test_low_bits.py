"""torchao's 8-bit moments and float8 products: against fp32, and saved and loaded to the bit."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from extend.errors import CompatibilityError
from extend.model_config import read_config
from extend.train import train
from extend.train.low_bits import check_low_bits, require_torchao
from extend.train.mesh import join_processes
from extend.train.model import CausalLoss, load_model
from extend.train.optim import build_optimizer, create_state, seed_rounding
from extend.train.shard import shard_model
from extend.train.state import RunState
from extend.train.trained import trained_parameters
from tests.spawn import spawn
from tests.train.test_loop import metrics
from tests.train.test_precision import step_loss
from tests.train.tiny import options, save_model, save_text

PHASE = {"length": 64, "steps": 1, "lr": 1e-3}
LOW = {"compute_dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao compiles its update, which takes half a minute on a CPU."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tied=False)


def make(directory: Path, **changes: object):
    return options(directory, [{"kind": "retrieval"}], **({"schedule": [PHASE]} | changes))


def test_moments_in_8_bits_are_near_those_in_fp32():
    """Within a block of 256, half of the widest step of the code: 0.9 / 64 / 2 of its largest.

    The first update is made before moments are rounded, so it is AdamW's own.
    """
    torch.manual_seed(0)
    start, gradient = torch.randn(64, 64), torch.randn(64, 64)
    pair = [nn.Parameter(start.clone()) for _ in range(2)]
    ours, theirs = (build_optimizer([p], make(Path("m"), weight_decay=0.1, optimizer=name))
                    for p, name in zip(pair, ("adamw-8bit", "adamw")))
    for p, optimizer in zip(pair, (ours, theirs)):
        p.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(pair[0], pair[1], rtol=1e-6, atol=1e-7)
    for name in ("exp_avg", "exp_avg_sq"):
        got, want = ours.state[pair[0]][name], theirs.state[pair[1]][name]
        assert got.codes.dtype == torch.uint8
        blocks = want.view(-1, 256).abs().amax(dim=1, keepdim=True)
        wrong = (got.dequantize() - want).view(-1, 256).abs() / blocks
        assert wrong.max() <= 0.9 / 64 / 2 * 1.001
        assert wrong.max() > 0.001  # they are rounded indeed


def test_stochastic_rounding_keeps_small_updates_on_average():
    """100 steps of 1e-6 on weights whose neighbours are 1.2e-4 away: 0.82 of one such step."""
    run = make(Path("m"), schedule=[PHASE | {"lr": 1e-6}], optimizer="adamw-8bit",
               weight_dtype="bfloat16", stochastic_rounding=True)
    p = nn.Parameter(torch.full((128, 128), 0.02, dtype=torch.bfloat16))
    start, optimizer = p[0, 0].item(), build_optimizer([p], run)
    for step in range(100):
        seed_rounding(run.seed, 0, step)
        p.grad = torch.ones_like(p)
        optimizer.step()
    # The sum of 16384 x 100 chances of 0.8 %: its standard deviation is 0.9 % of it.
    assert (start - p.detach().double().mean()).item() == pytest.approx(1e-4, rel=0.04)


def test_state_is_created_without_a_change_of_weights(model_dir: Path):
    for changes in ({}, {"optimizer": "adamw-8bit"}, {
            "optimizer": "adamw-8bit", "weight_dtype": "bfloat16", "stochastic_rounding": True}):
        run = make(model_dir, weight_decay=0.1, **changes)
        model = load_model(run, read_config(model_dir))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = build_optimizer(model.parameters(), run)
        create_state(optimizer)
        assert all("exp_avg" in optimizer.state[p] for p in model.parameters())
        torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx(
            [1e-3, 1e-3], rel=1e-6)


def go_on(rank: int, world: int, settings: dict, out: Path) -> tuple[set[str], bool]:
    """Kinds of moments, and whether weights after two more steps are those of a loaded run."""
    torch.compiler.set_stance("force_eager")
    run = make(Path(settings.pop("model")), **settings)
    ends, kinds = [], set()
    with join_processes() as processes, RunState(out, processes) as state:
        state.directory.mkdir(exist_ok=True)
        for load in (False, True):
            model = load_model(run, read_config(run.model))
            module = shard_model(CausalLoss(model, 48), processes, run)
            optimizer = build_optimizer(trained_parameters(module).values(), run)
            if load:
                state.load(2, module, optimizer)
            for step in range(2 if load else 0, 4):
                step_loss(module, step).backward()
                seed_rounding(run.seed, 0, step)
                optimizer.step()
                optimizer.zero_grad()
                if step == 1:
                    state.save(2, module, optimizer)
            ends.append([p.detach() for p in module.parameters()])
            kinds |= {type(getattr(each["exp_avg"], "_local_tensor", each["exp_avg"])).__name__
                      for each in optimizer.state.values()}
    local = [[getattr(p, "_local_tensor", p) for p in end] for end in ends]
    return kinds, all(map(torch.equal, *local))


SAVED = {"moments": {"optimizer": "adamw-8bit"}, "masters": LOW | {"optimizer": "adamw-8bit"},
         "chance": {"optimizer": "adamw-8bit", "weight_dtype": "bfloat16",
                    "stochastic_rounding": True}}


@pytest.mark.parametrize("name", SAVED)
def test_loaded_state_goes_on_to_the_bit(name: str, model_dir: Path, tmp_path: Path):
    kinds, same = go_on(0, 1, {"model": str(model_dir), **SAVED[name]}, tmp_path / "out")
    assert "OptimState8bit" in kinds and same


def go_on_all(rank: int, world: int, model: str, out: Path) -> list[tuple[set[str], bool]]:
    return [go_on(rank, world, {"model": model, **SAVED[name]}, out / name)
            for name in ("moments", "chance")]


def test_loaded_state_goes_on_to_the_bit_on_two_processes(tmp_path: Path):
    model = save_model(tmp_path / "model", tied=False, vocab_size=512)  # shards of whole blocks
    (tmp_path / "out").mkdir()
    for by_rank in spawn(2, go_on_all, str(model), tmp_path / "out"):
        for kinds, same in by_rank:
            assert "OptimState8bit" in kinds and same


@pytest.fixture(scope="module")
def in_bf16(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bf16")
    return train(float8_options(model_dir, save_text(directory)), directory / "out")


def float8_options(model: Path, text: Path, **changes: object):
    return options(model, [{"kind": "text", "path": str(text)}], **(LOW | changes))


@pytest.mark.parametrize("changes", [
    {"linear_dtype": "float8"},
    {"linear_dtype": "float8-rowwise", "recomputed_layers": 0}])
def test_float8_trains_as_bf16_does(changes: dict, model_dir: Path, in_bf16: Path, tmp_path: Path):
    """e4m3 has 3 bits of fraction: a product of two has a relative error of 2^-4 * 2^0.5 at most.

    Of a sum of random terms that is left as a few per cent; the loss at the start moves by less.
    """
    out = train(float8_options(model_dir, save_text(tmp_path), **changes), tmp_path / "out")
    losses, plain = ([line["loss"] for line in metrics(each)] for each in (out, in_bf16))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain), rtol=0.01, atol=0)
    assert losses != plain
    ours, source = load_file(out / "model.safetensors"), load_file(model_dir / "model.safetensors")
    assert ours.keys() == source.keys()


def test_float8_layers_are_chosen_and_the_rest_is_told(model_dir: Path, tmp_path: Path,
                                                       caplog: pytest.LogCaptureFixture):
    run = make(model_dir, linear_dtype="float8", mode="lora", lora_rank=4, **LOW)
    model = load_model(run, read_config(model_dir))
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["lm_head"] == "Linear"
    assert kinds["model.layers.1.mlp.up_proj.base_layer"] == "Float8Linear"
    assert kinds["model.layers.1.mlp.up_proj.lora_A.default"] == "Linear"
    assert not caplog.text
    odd = save_model(tmp_path / "odd", intermediate_size=40)
    load_model(make(odd, linear_dtype="float8", **LOW), read_config(odd))
    assert "6 of 14 linear layers stay in bfloat16, since their sizes are no multiples of 16" \
        in caplog.text
    assert "model.layers.1.mlp.down_proj (32, 40)" in caplog.text


def check(directory: Path, world: int = 1, **changes: object) -> None:
    run = make(directory, linear_dtype="float8", **changes)
    check_low_bits(run, torch.bfloat16 if run.compute_dtype == "bfloat16" else torch.float32, world)


def test_what_float8_cannot_do_is_refused(model_dir: Path, tmp_path: Path):
    with pytest.raises(CompatibilityError, match="but layers compute in float32"):
        check(model_dir)
    check(model_dir, **LOW)
    with pytest.raises(CompatibilityError, match="phase 1: .* a row of 64 gives 8; choose another"):
        check(model_dir, world=8, **LOW)
    with pytest.raises(CompatibilityError, match="tile_tokens is 24"):
        check(model_dir, tile_tokens=24, **LOW)
    odd = save_model(tmp_path / "odd", hidden_size=24, intermediate_size=40)
    with pytest.raises(CompatibilityError, match="of 14 linear layers none has sizes"):
        load_model(make(odd, linear_dtype="float8", **LOW), read_config(odd))


def test_without_torchao_its_options_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    for ask in (lambda: require_torchao("optimizer adamw-8bit"),
                lambda: check_low_bits(make(Path("m"), optimizer="adamw-8bit"), torch.float32, 1),
                lambda: build_optimizer([nn.Parameter(torch.ones(2, 2))],
                                        make(Path("m"), optimizer="adamw-8bit"))):
        with pytest.raises(CompatibilityError, match=r"optimizer adamw-8bit needs torchao.*pip "
                                                     r"install 'extend-context\[torchao\]'"):
            ask()


