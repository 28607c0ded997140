"""Learning rate against its closed form, AdamW and clipping against torch on whole tensors."""

import math

import pytest
import torch
from torch import nn

from extend.train.optim import build_optimizer, clip_gradients, learning_rate
from extend.train_options import Phase, TrainOptions


def phase(**changes: object) -> Phase:
    return Phase(**({"length": 64, "steps": 100, "lr": 2e-4, "warmup_frac": 0.1,
                     "min_lr_frac": 0.2} | changes))


def test_learning_rate_is_warm_up_then_cosine():
    for step in range(100):
        done = (step + 1) / 100
        if done <= 0.1:
            want = 2e-4 * done / 0.1
        else:
            want = 4e-5 + 1.6e-4 * (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2
        assert learning_rate(phase(), step) == pytest.approx(want, rel=1e-12)


def test_learning_rate_ends_at_its_floor_and_follows_tokens():
    assert learning_rate(phase(), 99) == pytest.approx(4e-5)
    by_tokens = phase(steps=None, tokens=64 * 4 * 100, batch_rows=4)
    assert by_tokens.num_steps == 100
    assert learning_rate(by_tokens, 37) == pytest.approx(learning_rate(phase(), 37))


@pytest.mark.parametrize("warmup_frac", [0.0, 1.0])
def test_learning_rate_of_a_single_step_is_finite(warmup_frac: float):
    assert 0 < learning_rate(phase(steps=1, warmup_frac=warmup_frac), 0) <= 2e-4


def test_optimizer_decays_matrices_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    twin = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    twin.load_state_dict(model.state_dict())
    options = TrainOptions(model="m", data=[{"kind": "retrieval"}], weight_decay=0.3,
                           betas=(0.8, 0.9), schedule=[phase()])
    ours = build_optimizer(model.parameters(), options)
    matrix, *vectors = twin.parameters()
    theirs = [torch.optim.AdamW([matrix], lr=2e-4, betas=(0.8, 0.9), weight_decay=0.3),
              torch.optim.AdamW(vectors, lr=2e-4, betas=(0.8, 0.9), weight_decay=0.0)]
    x = torch.randn(5, 3)
    for _ in range(3):
        for module, optimizers in ((model, [ours]), (twin, theirs)):
            module(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_clipping_scales_to_the_norm():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)),
                  nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.tensor([3.0, 0.0, 0.0])
    parameters[1].grad = torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    norm = clip_gradients(parameters, 1.0)
    torch.testing.assert_close(norm, torch.tensor(5.0))
    # torch divides by the norm plus 1e-6.
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0, 0.0]), rtol=1e-5,
                               atol=0)
