"""The one loop behind `fit` and `repair`: Adam on a lesson, judged by the half held out."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from extend.console import progress
from extend.errors import DataError, RecipeError, TrainingError
from extend.transfer.batches import Batch
from extend.transfer.objective import Lesson, Scores, judge, token_losses

log = logging.getLogger(__name__)
_BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """How long and how strongly to learn.

    Attributes:
        steps: most optimizer steps; 0 learns nothing.
        lr: learning rate after a tenth of the steps; it falls to 0 in a straight line.
        keep: weight of the target's answers against the long context, in [0, 1]; the objective is
            keep * kl + (1 - keep) * retrieval loss.
        check_every: steps between looks at the half held out.
        patience: looks without a new best after which to stop.
        clip_norm: largest norm of the gradient.
        recompute: compute activations again in the backward pass instead of keeping them.
    """

    steps: int
    lr: float
    keep: float = 0.5
    check_every: int = 5
    patience: int = 4
    clip_norm: float = 1.0
    recompute: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise RecipeError(f"keep is {self.keep}; it is a share, from 0 to 1")
        if self.steps < 0 or self.lr <= 0 or min(self.check_every, self.patience) < 1:
            raise RecipeError(f"steps {self.steps}, lr {self.lr}, check_every {self.check_every}, "
                              f"patience {self.patience}: steps must be at least 0, the learning "
                              "rate above 0, the others at least 1")

    def learning_rate(self, step: int) -> float:
        """Of a step, from 0."""
        warmup = min(1.0, (step + 1) / math.ceil(self.steps / 10))
        return self.lr * warmup * (1 - step / self.steps)


@dataclass(frozen=True)
class Course:
    """How learning went.

    Attributes:
        scores: of the held-out half with what was kept, the best look.
        objective: of those scores.
        step: steps after which they were taken.
        history: every look: step, objective, scores.
    """

    scores: Scores
    objective: float
    step: int
    history: list[dict[str, Any]]


def learn(model: PreTrainedModel, parameters: Sequence[nn.Parameter], lesson: Lesson,
          settings: LearnSettings, *, bounds: tuple[float, float] | None = None) -> Course:
    """Change `parameters` so that the objective falls; leave them as they were at the best look.

    Before the first step is a look, too, so what comes out is never judged worse than what went in.

    Args:
        parameters: fp32; the model depends on them. Nothing else is changed.
        bounds: smallest and largest value that a parameter may take.

    Raises:
        DataError: the lesson lacks long rows although `keep` gives them weight.
        TrainingError: a loss that is not finite.
    """
    if settings.keep < 1 and not lesson.long:
        raise DataError(f"keep is {settings.keep}, so the long context counts, but there are no "
                        "long rows; give some, or keep 1")
    optimizer = torch.optim.Adam(parameters, lr=settings.lr, betas=_BETAS)
    best = _look(model, lesson, settings, 0, [])
    kept = [p.detach().to("cpu", copy=True) for p in parameters]
    history = best.history
    with _recomputing(model, settings.recompute):
        for step in range(settings.steps):
            _step(model, parameters, optimizer, lesson, settings, step)
            if bounds is not None:
                with torch.no_grad():
                    for p in parameters:
                        p.clamp_(*bounds)
            if (step + 1) % settings.check_every and step + 1 < settings.steps:
                continue
            now = _look(model, lesson, settings, step + 1, history)
            history = now.history
            if now.objective < best.objective:
                best, kept = now, [p.detach().to("cpu", copy=True) for p in parameters]
            elif step + 1 - best.step >= settings.patience * settings.check_every:
                break
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
    return replace(best, history=history)


def _look(model: PreTrainedModel, lesson: Lesson, settings: LearnSettings, step: int,
          history: list[dict[str, Any]]) -> Course:
    scores = judge(model, lesson)
    objective = scores.objective(settings.keep)
    if not math.isfinite(objective):
        raise TrainingError(f"after step {step} the objective is {objective}; give a lower lr than "
                            f"{settings.lr}, or check the models")
    log.info("step %d/%d: objective %.4f, %s", step, settings.steps, objective, scores.text(),
             extra=progress(step, settings.steps))
    look = {"step": step, "objective": objective, **scores.to_json()}
    return Course(scores, objective, step, [*history, look])


def _step(model: PreTrainedModel, parameters: Sequence[nn.Parameter],
          optimizer: torch.optim.Optimizer, lesson: Lesson, settings: LearnSettings,
          step: int) -> None:
    """One batch of answers and one of long rows, each by its weight."""
    optimizer.zero_grad(set_to_none=True)
    for batches, weight in ((lesson.answers, settings.keep), (lesson.long, 1 - settings.keep)):
        if weight:
            _backward(model, batches[step % len(batches)], lesson, weight)
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
    if not bool(torch.isfinite(norm)):
        raise TrainingError(f"step {step + 1}: the gradient has norm {norm.item()}; give a lower "
                            f"lr than {settings.lr}, or check the models")
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate(step)
    optimizer.step()


def _backward(model: PreTrainedModel, batch: Batch, lesson: Lesson, weight: float) -> Tensor:
    loss = weight * token_losses(model, batch, lesson.head).mean()
    loss.backward()
    return loss.detach()


@contextmanager
def _recomputing(model: PreTrainedModel, recompute: bool) -> Iterator[None]:
    """Activation checkpointing of every layer; transformers applies it to models in training."""
    if not recompute:
        yield
        return
    was_training = model.training
    how = {"use_reentrant": False, "preserve_rng_state": False}
    # The older name is deprecated where the newer exists.
    new = hasattr(model, "activation_checkpointing_enable")
    if new:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    model.train()
    try:
        yield
    finally:
        (model.activation_checkpointing_disable if new else
         model.gradient_checkpointing_disable)()
        model.train(was_training)
