"""One model in memory, the targets and the long models on disk, and what is measured of a merge."""

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from safety_trials.longs import LONGS, LongModel, PasskeyTest, read_long
from safety_trials.scoring import (
    Batch,
    autocast,
    keep_reference,
    make_batches,
    read_examples,
    score,
    text_batches,
)
from safety_trials.siblings import Subject
from torch import Tensor

from extend.delta.svd import Factors
from extend.evaluate.forward import score_answers
from extend.evaluate.score import proportion
from extend.evaluate.tasks.task import Prompt
from extend.model_config import RopeSpec, read_config
from extend.tokenizer import load_tokenizer

from .deltas import Delta, Subspaces, factorize
from .plan import Level, LongSpec, Target

RANKS = (4, 8, 16, 32, 64, 128)
PROSE = "prose.txt"
CHUNK = 32768  # most tokens of a forward in passkeys


def folder_name(label: str) -> str:
    return label.replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class Change:
    """What is put on a target.

    Attributes:
        delta: added to the target's weights.
        weight: times this.
        own: times this much of the target's own delta stays; 0 where `delta` holds it too.
        rope: the RoPE of the result; None: the long model's.
        stored: dtype that the result is rounded to.
        numbers: what is to be known about the change, for the row.
        finish: changes the merged model in place, and returns more such numbers.
    """

    delta: Delta
    weight: float = 1.0
    own: float = 1.0
    rope: RopeSpec | None = None
    stored: torch.dtype = torch.float32
    numbers: Mapping[str, Any] | None = None
    finish: Callable[["Case"], Mapping[str, Any]] | None = None


def write_factors(path: Path, factors: Mapping[str, Factors]) -> None:
    parts = {f"{name}:{key}": tensor.contiguous() for name, f in factors.items()
             for key, tensor in zip(Factors._fields, (*f[:3], torch.tensor(f.total,
                                    dtype=torch.float64)), strict=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(parts, partial)
    partial.replace(path)


def read_factors(path: Path, device: torch.device) -> dict[str, Factors]:
    parts: dict[str, dict[str, Tensor]] = {}
    for label, tensor in load_file(path, device=str(device)).items():
        name, _, key = label.rpartition(":")
        parts.setdefault(name, {})[key] = tensor
    return {name: Factors(**{**f, "total": float(f["total"])}) for name, f in parts.items()}


class Retrieval:
    """Passkeys in filler and in text; prompts of a length are made when it is first asked for."""

    def __init__(self, tokenizer: Any, plan: Any, texts: Mapping[str, Path | None], depths: int):
        self.tokenizer, self.plan, self.texts, self.depths = tokenizer, plan, texts, depths
        self.prompts: dict[tuple[str, int], list[Prompt]] = {}

    def measure(self, subject: Subject, length: int) -> dict[str, dict[str, Any]]:
        """Kind of text -> passkeys found, and the mean loss on their tokens."""
        found = {}
        for kind in self.texts:
            prompts = self._prompts(kind, length)
            with autocast(subject.device), torch.inference_mode():
                scores = score_answers(subject.model, prompts, chunk=max(CHUNK, length))
            right = sum(s.correct for s in scores)
            asked = sum(prompt.answer_len for prompt in prompts)
            found[kind] = {"right": right, **proportion(right, len(scores)),
                           "loss": sum(s.nll for s in scores) / asked}
        return found

    def _prompts(self, kind: str, length: int) -> list[Prompt]:
        if (kind, length) not in self.prompts:
            plan = replace(self.plan, passkey=(length,), depths=self.depths)
            test = PasskeyTest(self.tokenizer, plan, self.texts[kind])
            self.prompts[kind, length] = test.prompts[length]
        return self.prompts[kind, length]


class Bench:
    """All that the units of one process share.

    Attributes:
        subject: the model, whose weights and RoPE are changed in place.
        native: the base's own RoPE.
    """

    def __init__(self, level_name: str, level: Level, out: Path, skills: Path, seed: int,
                 commit: str, device: torch.device):
        self.level_name, self.level, self.out, self.device = level_name, level, out, device
        self.seed, self.commit = seed, commit
        self.skills = skills / level_name
        config = read_config(level.model)
        self.native = config.rope
        self.tokenizer = load_tokenizer(level.model)
        self.subject = Subject(config, str(level.model), device)
        self.num_layers = config.raw["num_hidden_layers"]
        texts = {"filler": None, "text": level.heldout or out / PROSE}
        self.retrieval = Retrieval(self.tokenizer, LONGS[level_name], texts, level.depths)
        self.text = text_batches(self.tokenizer, [level.text], windows=level.windows,
                                 length=level.window, stride=level.stride,
                                 tokens=level.batch_tokens, device=device)
        self.tests: dict[str, list[Batch]] = {}
        self._longs: dict[str, LongModel] = {}
        self._factors: dict[str, dict[str, Factors]] = {}
        self._subspaces: dict[str, Subspaces] = {}
        self._deltas: dict[Target, dict[str, Tensor]] = {}
        self._known: Known | None = None

    # ---- what is on disk ------------------------------------------------------------------------

    def long_folder(self, spec: LongSpec | str) -> Path:
        return self.out / "long" / folder_name(spec if isinstance(spec, str) else spec.name)

    def target_file(self, target: Target) -> Path:
        return self.out / "targets" / f"{folder_name(target.name)}.safetensors"

    def long(self, name: str) -> LongModel:
        if name not in self._longs:
            self._longs[name] = read_long(name, self.long_folder(name), self.subject)
        return self._longs[name]

    def factors(self, of: Target | str) -> dict[str, Factors]:
        """The largest rank of a target's or of a long model's delta; made once, kept on disk."""
        name = of if isinstance(of, str) else of.name
        if name not in self._factors:
            path = self.factor_file(of)
            if not path.exists():
                delta = self.long(of).delta if isinstance(of, str) else self.target_delta(of)
                write_factors(path, factorize(delta, max(RANKS)))
            self._factors[name] = read_factors(path, self.device)
        return self._factors[name]

    def factor_file(self, of: Target | str) -> Path:
        name = of if isinstance(of, str) else of.name
        return self.out / "factors" / f"{folder_name(name)}.safetensors"

    def target_delta(self, target: Target) -> dict[str, Tensor]:
        """What its fine-tuning did to the base."""
        if target.skill is None:
            return {}
        if target not in self._deltas:
            self._deltas[target] = load_file(self.target_file(target), device=str(self.device))
        return self._deltas[target]

    def subspaces(self, of: Target | str) -> Subspaces:
        """Leading subspaces of a target's or of a long model's delta."""
        name = of if isinstance(of, str) else of.name
        if name not in self._subspaces:
            self._subspaces[name] = Subspaces(self.factors(of))
        return self._subspaces[name]

    def examples(self, target: Target, part: str, limit: int | None = None) -> list[Prompt]:
        return read_examples(self.tokenizer, self.skills / target.skill / f"{part}.jsonl", limit)

    def test(self, target: Target) -> list[Batch] | None:
        """The target's skill, by examples that it has not seen."""
        if target.skill is None:
            return None
        if target.skill not in self.tests:
            prompts = self.examples(target, "test", self.level.limit)
            self.tests[target.skill] = make_batches(prompts, self.level.batch_tokens, self.device)
        return self.tests[target.skill]

    # ---- states of the model --------------------------------------------------------------------

    def put_native(self, target: Target) -> None:
        """The target as it is."""
        self.subject.become((1.0, self.target_delta(target)))
        self.subject.set_rope(self.native, self.native.original_len)

    def enter(self, target: Target, long: str) -> "Case":
        """A target and a long model, with what the target by itself says kept for comparison."""
        known = self._known if self._known and self._known.target == target else None
        if known is None:
            self._known = None  # before the next one is made: each takes gigabytes
            self.put_native(target)
            known = self._known = Known(self, target)
        return Case(self, target, long, known)

    @contextmanager
    def merged(self, case: "Case", change: Change) -> Iterator[dict[str, Any]]:
        """The merged model, and numbers about it."""
        subject, long = self.subject, case.long
        subject.become((change.own, self.target_delta(case.target)), (change.weight, change.delta))
        if change.stored != torch.float32:
            with torch.no_grad():
                for parameter in subject.model.parameters():
                    parameter.copy_(parameter.to(change.stored))
        subject.set_rope(change.rope or long.rope, long.length)
        numbers = dict(change.numbers or {})
        if change.finish is not None:
            numbers |= change.finish(case)
        yield numbers

    def about(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {"model": "/".join(self.level.model.parts[-2:]),
                "device": torch.cuda.get_device_name(0) if cuda else platform.machine(),
                "torch": torch.__version__, "transformers": transformers.__version__,
                "native_len": self.native.original_len, "rope_theta": self.native.rope_theta,
                "seed": self.seed, "commit": self.commit}


class Known:
    """Log probabilities of the target by itself, under its own RoPE."""

    def __init__(self, bench: Bench, target: Target):
        model, self.target, self.test = bench.subject.model, target, bench.test(target)
        self.skill = None if self.test is None else keep_reference(model, self.test)
        self.text = keep_reference(model, bench.text)


class Case:
    """A target and a long model."""

    def __init__(self, bench: Bench, target: Target, long: str, known: Known):
        self.bench, self.target, self.long_name, self.known = bench, target, long, known

    @cached_property
    def long(self) -> LongModel:
        return self.bench.long(self.long_name)

    @property
    def delta(self) -> Delta:
        """The long model's."""
        return self.long.delta

    @property
    def own_delta(self) -> Delta:
        """The target's."""
        return self.bench.target_delta(self.target)

    def measure(self, lengths: Sequence[int]) -> dict[str, Any]:
        """The model as it is now: skill, short text, passkeys."""
        model = self.bench.subject.model
        text = score(model, self.bench.text, self.known.text)
        row: dict[str, Any] = {"text": {"loss": text.loss, "kl": text.kl}, "skill": None}
        if self.known.test is not None:
            own = score(model, self.known.test, self.known.skill)
            row["skill"] = {"right": own.right, **proportion(own.right, own.count),
                            "loss": own.loss, "kl": own.kl}
        row["passkey"] = {str(length): self.bench.retrieval.measure(self.bench.subject, length)
                          for length in lengths}
        return row
