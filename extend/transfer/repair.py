"""A short repair of a merged model: it learns to answer as the target did before the merge.

No labels are needed. What is learnt from are the target's own answers, as distributions, and rows
with hidden facts, so that the long context stays.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from extend.delta.pair import layer_of
from extend.errors import CompatibilityError, RecipeError
from extend.transfer.learn import LearnSettings, learn
from extend.transfer.objective import Lesson, Scores
from extend.transfer.sums import LowRank, added, whole

REPAIR = LearnSettings(steps=100, lr=2e-5)


@dataclass(frozen=True)
class Repair:
    """How a repair went.

    Attributes:
        step: steps that the kept weights have seen; 0 where none made the model better.
        trained: names of the parameters that may have changed.
        scores: held-out scores of `merged` and `repaired`.
        history: what each look at the held-out half found.
    """

    step: int
    trained: list[str]
    scores: dict[str, Scores]
    history: list[dict[str, Any]]


def repair_model(model: PreTrainedModel, lesson: Lesson, *, settings: LearnSettings = REPAIR,
                 rank: int | None = None, seed: int = 0) -> Repair:
    """Train the decoder layers of a merged model, in place.

    The weights of the best look at the held-out half stay, those before the first step included.

    Args:
        model: a merged model under its own, long RoPE.
        lesson: of the target before the merge, under the target's RoPE.
        rank: train a LoRA of this rank on every matrix of the layers, and add it at the end; None
            trains all weights of the layers.
        seed: of the LoRA's first factor.

    Raises:
        CompatibilityError: all weights are to be trained, but they are not fp32: their steps would
            be lost to rounding.
        RecipeError: a rank below 1.
        DataError: see `learn`.
        TrainingError: see `learn`.
    """
    layers = {name: p for name, p in model.named_parameters() if layer_of(name) is not None}
    if rank is None:
        _check_dtypes(layers)
        with _asking(model, layers):
            course = learn(model, list(layers.values()), lesson, settings)
    else:
        layers = {name: p for name, p in layers.items() if p.ndim == 2}
        deltas = _fresh_lora(layers, rank, seed)
        factors = [f for delta in deltas.values() for f in (delta.lora_A, delta.lora_B)]
        with _asking(model, {}), added(model, deltas, dict.fromkeys(deltas, 1.0)):
            course = learn(model, factors, lesson, settings)
        _add(layers, deltas)
    first = course.history[0]
    before = Scores(**{key: first[key] for key in Scores.__dataclass_fields__})
    return Repair(course.step, sorted(layers), {"merged": before, "repaired": course.scores},
                  course.history)


def _check_dtypes(layers: dict[str, nn.Parameter]) -> None:
    for name, p in layers.items():
        if p.dtype != torch.float32:
            raise CompatibilityError(f"{name} is {p.dtype}; load the model in float32 to train all "
                                     "its weights, or give a rank")


def _fresh_lora(layers: dict[str, nn.Parameter], rank: int, seed: int) -> dict[str, LowRank]:
    """B = 0 and A as PEFT draws it: uniform with variance 1 / (3 * in_features)."""
    if rank < 1:
        raise RecipeError(f"rank is {rank}; it must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, p in layers.items():
        bound = p.shape[1] ** -0.5
        first = torch.empty(rank, p.shape[1]).uniform_(-bound, bound, generator=generator)
        deltas[name] = LowRank(nn.Parameter(first.to(p.device)),
                               nn.Parameter(torch.zeros(p.shape[0], rank, device=p.device)))
    return deltas


@torch.no_grad()
def _add(layers: dict[str, nn.Parameter], deltas: dict[str, LowRank]) -> None:
    for name, delta in deltas.items():
        layers[name].copy_(layers[name].float() + whole(delta))


@contextmanager
def _asking(model: nn.Module, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """Only `trained` asks for gradients until the block ends; none is left behind."""
    asked = {id(p): p.requires_grad for p in model.parameters()}
    chosen = {id(p) for p in trained.values()}
    parameters = list(model.parameters())
    try:
        for p in parameters:
            p.requires_grad_(id(p) in chosen)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(asked[id(p)])
            p.grad = None
