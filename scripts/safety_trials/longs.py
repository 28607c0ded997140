"""Long models of the base, each trained under another RoPE, to be merged into the siblings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import extend
from extend.checkpoint import Checkpoint
from extend.evaluate.forward import score_answers
from extend.evaluate.frame import Frame
from extend.evaluate.tasks.passkey import Passkey, PasskeyText
from extend.evaluate.tasks.task import Prompt
from extend.model_config import RopeSpec, read_config
from extend.train_options import TrainOptions

from .scoring import autocast
from .settings import Setting
from .siblings import Subject

TRAINED = ("layers", r"model\.norm")
DEEPEST = 0.7  # of a passkey; deeper ones could lie within the base's own window


@dataclass(frozen=True)
class LongPlan:
    """How long models of a level are trained and scored.

    Attributes:
        settings: names of the RoPE settings, one long model each.
        length, steps, rows, lr: the training.
        facts: how many facts a row hides.
        passkey: lengths at which passkeys are asked, the native one first.
        depths: at how many depths each.
    """

    settings: tuple[str, ...]
    length: int
    steps: int
    rows: int
    lr: float
    facts: tuple[int, ...]
    passkey: tuple[int, ...]
    depths: int


LONGS = {
    "smollm2": LongPlan(("ntk x16", "critical x16", "by-parts 1-32 x16", "yarn x16"), 32768, 90, 1,
                        1e-4, (1, 8, 32), (8192, 16384, 32768), 10),
    "tiny": LongPlan(("ntk x4", "critical x4", "by-parts 1-4 x4", "yarn x4"), 1024, 60, 1, 1e-4,
                     (1,), (256, 1024), 20),
}


@dataclass(frozen=True)
class LongModel:
    """A trained long model.

    Attributes:
        name: its RoPE setting.
        rope: the RoPE it was trained under.
        length: tokens that RoPE was made for.
        delta: its weights minus the base's.
    """

    name: str
    rope: RopeSpec
    length: int
    delta: Mapping[str, Tensor]


def folder_name(setting: str) -> str:
    return setting.replace(" ", "-").replace(",", "")


def train_long(model: str, setting: Setting, plan: LongPlan, text: str, native_len: int,
               out: Path, seed: int, trainable: Sequence[str] = TRAINED) -> Path:
    """Train the base under a RoPE with `extend.train`, in this process, unless `out` is there.

    Args:
        trainable: expressions for the names of the weights that change.
    """
    if out.exists():
        return out
    classic = {"template": "classic"} if plan.facts == (1,) else {}
    phase = {"length": plan.length, "steps": plan.steps, "batch_rows": plan.rows, "lr": plan.lr,
             "rope": {"method": setting.method, "options": setting.options},
             "rope_to": setting.factor * native_len}
    hidden: dict[str, Any] = {"kind": "retrieval", "facts": list(plan.facts), **classic}
    # The tiny base's text is for replay alone: its notes hold keys of their own.
    in_text = [{**hidden, "path": text, "weight": 0.6}] if len(plan.facts) > 1 else []
    data = [{"kind": "text", "path": text, "weight": 0.3}, *in_text,
            {**hidden, "weight": 0.1 if in_text else 0.7}]
    options = TrainOptions(model=model, schedule=[phase], data=data, answer_weight=0.5,
                           trainable=list(trainable), export_dtype="float32", nproc=1, seed=seed)
    return extend.train(options, out)


def read_long(name: str, directory: Path, subject: Subject) -> LongModel:
    """Load a long model's delta: the tensors that its training changed."""
    config, checkpoint = read_config(directory), Checkpoint(directory)
    whole = {tensor: checkpoint.read(tensor).float().to(subject.device) - weight
             for tensor, weight in subject.base.items()}
    delta = {tensor: d for tensor, d in whole.items() if d.any()}
    return LongModel(name, config.rope, config.max_position_embeddings, delta)


class PasskeyTest:
    """Passkeys in text (or filler, without one) at several lengths, with the same prompts for all.
    """

    def __init__(self, tokenizer: Any, plan: LongPlan, text: Path | None):
        task = PasskeyText(haystack=str(text), controls=False) if text else Passkey(controls=False)
        depths = [DEEPEST * i / max(1, plan.depths - 1) for i in range(plan.depths)]
        frame = Frame.of(tokenizer)
        self.prompts: dict[int, list[Prompt]] = {length: [
            prompt for cell in task.cells(task.name, [length], depths, 1)
            for prompt in task.prompts(frame, cell, seed=0)] for length in plan.passkey}

    def score(self, subject: Subject, lengths: int | None = None) -> dict[str, list[int]]:
        """length -> [found, asked], for all or the first so many lengths."""
        found = {}
        for length, prompts in list(self.prompts.items())[:lengths]:
            with autocast(subject.device), torch.inference_mode():
                scores = score_answers(subject.model, prompts, chunk=max(length, 16384))
            found[str(length)] = [sum(s.correct for s in scores), len(scores)]
        return found
