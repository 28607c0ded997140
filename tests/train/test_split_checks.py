"""What cannot be split over processes is refused before anything runs, by name."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from transformers import GptOssConfig, LlamaConfig, Phi3Config, Qwen3Config

from extend.errors import CompatibilityError, LayoutError, TrainingError
from extend.model_config import read_config
from extend.train.mesh import Processes, check_attention, check_schedule, check_world, split_world
from extend.train.session import plan_ropes
from extend.train.tensor_parallel import (
    _placement,
    _split_block,
    _split_vocabulary,
    check_tensor_parallel,
    read_plan,
)
from extend.train_options import Phase, TrainOptions
from tests.train.tiny import save_model, save_text


def run_of(model: Path | str = "m", rows: int = 1, **changes: Any) -> TrainOptions:
    data = changes.pop("data", [{"kind": "retrieval"}])
    return TrainOptions(model=str(model), data=data, **changes, schedule=[
        Phase(length=64, steps=1, lr=1e-4, batch_rows=rows)])


@pytest.mark.parametrize(("rows", "world", "tp", "expected"), [
    (1, 8, 2, (1, 4)), (2, 8, 2, (2, 2)), (4, 8, 2, (4, 1)), (8, 8, 2, (4, 1)), (8, 8, 8, (1, 1))])
def test_rows_are_dealt_to_teams(rows: int, world: int, tp: int, expected: tuple[int, int]):
    assert split_world(rows, world, tp) == expected


def test_rows_divide_over_teams_not_processes():
    phases = [Phase(length=4, steps=1, lr=1e-4)]
    check_schedule(phases, "zigzag", 4, tensor_parallel=2)
    with pytest.raises(LayoutError, match="length 4 must be a multiple of 2 x 4 ranks"):
        check_schedule(phases, "zigzag", 4)


def test_a_team_is_counted_once():
    device = torch.device("cpu")
    ranks = [Processes(rank, 6, device, None, tensor_parallel=3).tp_rank for rank in range(6)]
    assert ranks == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("changes", "world", "per_host", "match"), [
    ({"tensor_parallel": 3}, 4, None, "tensor_parallel is 3, but there are 4 processes"),
    ({"tensor_parallel": 2}, 1, None, "tensor_parallel is 2, but there are 1 processes"),
    ({"tensor_parallel": 4}, 12, 6, "tensor_parallel is 4, but each host has 6 processes"),
    ({"shard_over": 3}, 8, None, "shard_over is 3, but there are 8 processes .* that divides 8"),
    ({"shard_over": 4, "tensor_parallel": 4}, 8, None, "tensor_parallel 4; .* that divides 2")])
def test_processes_must_divide(changes: dict[str, int], world: int, per_host: int | None,
                               match: str, monkeypatch: pytest.MonkeyPatch):
    if per_host is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_host))
    with pytest.raises(TrainingError, match=match):
        check_world(run_of(**changes), world)
    check_world(run_of(), world)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("tp", "match"), [
    (3, "the 4 query heads do not divide by tensor_parallel 3"),
    (4, "the 2 key and value heads do not divide by tensor_parallel 4")])
def test_heads_must_divide(tp: int, match: str, model_dir: Path):
    config = read_config(model_dir)
    with pytest.raises(CompatibilityError, match=match):
        check_tensor_parallel(run_of(tensor_parallel=tp), config)
    check_tensor_parallel(run_of(tensor_parallel=2), config)


def test_a_plan_is_checked_before_a_run(model_dir: Path, tmp_path: Path):
    text = [{"kind": "text", "path": str(save_text(tmp_path))}]
    assert plan_ropes(run_of(model_dir, data=text, tensor_parallel=2), 4)
    with pytest.raises(CompatibilityError, match="do not divide by tensor_parallel 4"):
        plan_ropes(run_of(model_dir, data=text, tensor_parallel=4), 4)
    with pytest.raises(TrainingError, match="tensor_parallel is 2, but there are 3"):
        plan_ropes(run_of(model_dir, data=text, tensor_parallel=2), 3)


def test_a_strategy_sees_the_heads_of_one_process():
    run = run_of(strategy="ulysses", tensor_parallel=2)
    check_attention(run, 8, 8)  # 4 heads over a ring of 4
    with pytest.raises(CompatibilityError, match="4 processes of a ring .* 2 query heads by 4"):
        check_attention(run, 4, 8)


def test_plans_are_read_by_module():
    assert read_plan(Qwen3Config()) == {
        "layers.*.self_attn": {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise"), "o_proj": "rowwise",
            **dict.fromkeys(("q_norm", "k_norm"), "replicated_with_grad_allreduce")},
        "layers.*.mlp": {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}}


def with_plan(**plan: str) -> LlamaConfig:
    config = LlamaConfig()
    config.base_model_tp_plan = {name.replace("__", "."): style for name, style in plan.items()}
    return config


@pytest.mark.parametrize(("config", "match"), [
    (Phi3Config(pad_token_id=0), "phi3: .* plan has 'colwise_gather_output' for .*qkv_proj"),
    (GptOssConfig(), "gpt_oss: transformers.* tensor parallel plan"),
    (with_plan(), "llama: transformers has no tensor parallel plan"),
    (with_plan(mlp__up="colwise"), "plan splits mlp by colwise only")])
def test_plans_that_cannot_be_honoured(config: LlamaConfig, match: str):
    with pytest.raises(CompatibilityError, match=match):
        read_plan(config)


@pytest.mark.parametrize(("path", "leaf", "expected"), [
    ("q", "weight", Shard(0)), ("q", "bias", Shard(0)), ("o", "weight", Shard(1)),
    ("o", "bias", Replicate()), ("n", "weight", Replicate()),
    ("q.base_layer", "weight", Shard(0)), ("q.lora_A.default", "weight", Replicate()),
    ("q.lora_B.default", "weight", Shard(0)), ("o.lora_A.default", "weight", Shard(1)),
    ("o.lora_B.default", "weight", Replicate())])
def test_how_parameters_are_split(path: str, leaf: str, expected: Any):
    styles = {"q": "colwise", "o": "rowwise", "n": "replicated_with_grad_allreduce"}
    assert _placement(path, leaf, styles) == expected


@pytest.mark.parametrize("name", ["sinks", "gate.weight"])
def test_parts_outside_the_plan_are_refused(name: str):
    block = nn.Module()
    if name == "sinks":
        block.sinks = nn.Parameter(torch.ones(2))
    else:
        block.gate = nn.Linear(2, 2)
    with pytest.raises(CompatibilityError, match=f"layers.0.mlp.{name} is not in transformers'"):
        _split_block("layers.0.mlp", block, {"up_proj": "colwise"}, None)
    assert _placement("q.lora_magnitude_vector", "default", {"q": "colwise"}) is None


def test_embeddings_of_another_kind_are_refused():
    model = SimpleNamespace(get_input_embeddings=lambda: nn.Identity(),
                            get_output_embeddings=lambda: nn.Linear(2, 2))
    with pytest.raises(CompatibilityError, match="embeddings of Identity and a head of Linear"):
        _split_vocabulary(model, None)
