"""Weights in fp32 that are gathered in bf16, and what weights in bf16 lose."""

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from extend.model_config import read_config
from extend.train.mesh import join_processes
from extend.train.model import CausalLoss, load_model
from extend.train.optim import build_optimizer, tell_lost_updates
from extend.train.shard import shard_model
from extend.train.trained import trained_parameters
from tests.train.tiny import options, save_model

PHASE = {"length": 64, "steps": 1, "lr": 1e-3}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tied=False)


def make(directory: Path, **changes: object):
    return options(directory, [{"kind": "retrieval"}], **({"schedule": [PHASE]} | changes))


def step_loss(module: CausalLoss, step: int) -> Tensor:
    """Of one random row of 32 tokens."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 200, (1, 32), generator=generator)
    weights = torch.rand(1, 32, generator=generator) / 32
    return module(ids, torch.arange(32)[None], ids.roll(-1), weights, None)[0]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw-offload"}])
def test_equals_a_bf16_model_with_fp32_masters(changes: dict, model_dir: Path):
    """By hand: round the masters into a bf16 model, take its gradients, update the masters."""
    run = make(model_dir, compute_dtype="bfloat16", **changes)
    low = make(model_dir, weight_dtype="bfloat16")
    config = read_config(model_dir)
    plain = CausalLoss(load_model(low, config), 48)
    masters = {name: p.detach().float().clone().requires_grad_() for name, p in
               CausalLoss(load_model(make(model_dir), config), 48).named_parameters()}
    theirs = torch.optim.AdamW(
        [{"params": [p for p in masters.values() if p.ndim > 1]},
         {"params": [p for p in masters.values() if p.ndim == 1]}], lr=1e-3, betas=run.betas,
        weight_decay=0.0, fused=run.optimizer == "adamw-offload")
    with join_processes() as processes:
        module = shard_model(CausalLoss(load_model(run, config), 48), processes, run)
        ours = build_optimizer(module.parameters(), run)
        for step in range(3):
            loss = step_loss(module, step)
            loss.backward()
            with torch.no_grad():
                for name, p in plain.named_parameters():
                    p.copy_(masters[name])
            want = step_loss(plain, step)
            want.backward()
            torch.testing.assert_close(loss, want, rtol=0, atol=0)
            for name, p in plain.named_parameters():
                masters[name].grad = p.grad.float()
                p.grad = None
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
        got = {name: whole(p.detach()) for name, p in module.named_parameters()}
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert not dist.is_initialized()  # the group of one process is gone
    torch.testing.assert_close(got, {n: p.detach() for n, p in masters.items()}, rtol=0, atol=0)


def test_what_is_not_trained_has_the_dtype_that_it_is_used_in(model_dir: Path):
    run = make(model_dir, mode="lora", trained_beside=["norms"], compute_dtype="bfloat16")
    model = load_model(run, read_config(model_dir))
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    with join_processes() as processes:
        module = shard_model(CausalLoss(model, 48), processes, run)
        step_loss(module, 0).backward()
        gradients = [p.grad for p in trained_parameters(module).values()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in map(whole, gradients))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_small_updates_are_lost_in_bf16_weights(dtype: str, caplog: pytest.LogCaptureFixture):
    """lr 1e-6 on weights of 0.02, whose neighbours in bf16 are 1.2e-4 away."""
    run = options(Path("m"), [{"kind": "retrieval"}], schedule=[PHASE | {"lr": 1e-6}],
                  weight_dtype=dtype)
    weights = torch.full((64, 64), 0.02, dtype=getattr(torch, dtype))
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = build_optimizer([parameter], run)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    with caplog.at_level(logging.WARNING, "extend.train"):
        tell_lost_updates(run)
    if dtype == "bfloat16":
        torch.testing.assert_close(parameter.detach(), weights, rtol=0, atol=0)
        assert "with lr 1e-06, weights above 0.00051 stay what they are" in caplog.text
    else:  # 100 steps of 1e-6 each
        torch.testing.assert_close(parameter.detach(), weights - 1e-4, rtol=1e-5, atol=0)
        assert not caplog.text


@pytest.mark.parametrize(("changes", "match"), [
    ({"weight_dtype": "bfloat16", "compute_dtype": "float32"},
     "weight_dtype is bfloat16 but compute_dtype is float32"),
    ({"stochastic_rounding": True}, "adamw-8bit, which are float32 and adamw"),
])
def test_dtypes_that_do_not_go_together_are_refused(changes: dict, match: str):
    with pytest.raises(ValidationError, match=match):
        options(Path("m"), [{"kind": "retrieval"}], **changes)
