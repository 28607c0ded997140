"""Make models when they are first needed, do the units, and keep what was measured."""

import json
import platform
import shutil
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transfer_lab.claims import Clock

import extend
from extend.errors import TrainingError
from extend.output import write_json
from extend.train_options import TrainOptions

from .plan import NOISE, SHIPPED, WHOLE, Phase, Plan, Unit, train_seconds

TRAINED = ["layers", r"model\.norm"]  # tied embeddings stay, so adapters stay small
UNIT = "unit.json"
STOPPED = "stopped by"  # how the message of a training begins that a signal ended
Key = tuple[str, ...]


class Workshop:
    """Models by key, made once and kept on disk under `out`.

    Keys: (shipped,), (long, SCHEDULE), (sibling, SKILL), (bf16, SCHEDULE), (adapter, SCHEDULE,
    RANK), (merged, SCHEDULE, RANK, SKILL or shipped[, bare]); `bare` leaves the sidecar's deltas
    out.
    """

    def __init__(self, plan: Plan, out: Path, seed: int):
        self.plan, self.out, self.seed = plan, out, seed
        self.nproc: dict[str, Any] = {"nproc": 1, "seed": seed}

    def path(self, key: Key) -> Path:
        return self.plan.model if key == (SHIPPED,) else self.out / "models" / "--".join(key)

    def make(self, key: Key) -> Path:
        """The directory of a model, after making what it lacks."""
        path, seconds = self.path(key), 0.0
        if not path.exists():
            for other in self.needs(key):
                self.make(other)
            path.parent.mkdir(parents=True, exist_ok=True)
            begin = time.perf_counter()
            self._maker(key[0])(key, path)
            seconds = time.perf_counter() - begin
        record = self.out / "made" / f"{path.name}.json"
        if key != (SHIPPED,) and not record.exists():
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, {"key": list(key), "seconds": seconds,
                                "adapter_bytes": adapter_bytes(path), **course(path)})
        return path

    def needs(self, key: Key) -> list[Key]:
        """What a model is made from."""
        if key[0] == "merged":
            _, schedule, rank, target = key[:4]
            source = ("long", schedule) if rank == WHOLE else ("adapter", schedule, rank)
            return [source, *([] if target == SHIPPED else [("sibling", target)])]
        if key[0] == "adapter":
            return [("bf16" if key[2] == NOISE else "long", key[1])]
        return [("long", key[1])] if key[0] == "bf16" else []

    def seconds(self, key: Key) -> float:
        """What making a model, and all that it lacks, is expected to take."""
        if self.path(key).exists():
            return 0.0
        costs = self.plan.costs
        own = {"long": train_seconds(self.plan),
               "sibling": costs.start + costs.step * self.plan.siblings.get(key[1], 0)
               }.get(key[0], costs.surgery)
        return own + sum(self.seconds(other) for other in self.needs(key))

    def _maker(self, kind: str) -> Callable[[Key, Path], Any]:
        return {"long": self._train_long, "sibling": self._train_sibling, "bf16": self._round,
                "adapter": self._extract, "merged": self._merge}[kind]

    def _train_long(self, key: Key, out: Path) -> None:
        plan, (_, schedule) = self.plan, key
        options = TrainOptions(
            model=str(plan.model), trainable=TRAINED, export_dtype="float32", answer_weight=0.5,
            rope=dict(plan.ropes[schedule]), data=self._data(), save_every=50,
            schedule=[self._phase(p, skips=not i) for i, p in enumerate(plan.phases)],
            **self.nproc)
        extend.train(options, out)

    def _phase(self, phase: Phase, *, skips: bool) -> dict[str, Any]:
        skips = skips and phase.length < self.plan.target
        skipping = {"position_span": self.plan.target} if skips else {}
        return {"length": phase.length, "steps": phase.steps, "batch_rows": phase.rows,
                "lr": phase.lr, "rope_to": self.plan.target, **skipping}

    def _data(self) -> list[dict[str, Any]]:
        text, facts = str(self.plan.train_text), list(self.plan.facts)
        if facts == [1]:  # a model so small knows one form of question
            return [{"kind": "retrieval", "facts": facts, "template": "classic", "weight": 0.7},
                    {"kind": "text", "path": text, "weight": 0.3}]
        whole = {"kind": "text", "path": text, "join": True}
        taught = {**whole, "distill": True, "document_length": self.plan.native}
        short = {"kind": "text", "document_length": self.plan.window, "distill": True}
        return [*({**source, "weight": 0.4 * share} for source, share in (
                    (taught, self.plan.taught), (whole, 1 - self.plan.taught)) if share),
                *({**short, "path": str(path), "weight": 0.2 / len(self.plan.short_texts)}
                  for path in self.plan.short_texts),
                {"kind": "retrieval", "path": text, "facts": facts, "weight": 0.3},
                {"kind": "retrieval", "facts": facts[:2], "weight": 0.1}]

    def _train_sibling(self, key: Key, out: Path) -> None:
        plan, (_, skill) = self.plan, key
        phase = {"length": plan.sibling_length, "steps": plan.siblings[skill], "batch_rows": 8,
                 "lr": plan.sibling_lr}
        extend.train(TrainOptions(
            model=str(plan.model), trainable=TRAINED, schedule=[phase], save_every=500,
            data=[{"kind": "examples", "path": str(plan.skills / skill / "train.jsonl")}],
            **self.nproc), out)

    def _round(self, key: Key, out: Path) -> None:
        """The long model as it would be published; the noise rule reads its rounding."""
        extend.merge(None, self.plan.model, out, tuned=self.path(("long", key[1])),
                     base=self.plan.model, dtype="bfloat16")

    def _extract(self, key: Key, out: Path) -> None:
        size = {} if key[2] == NOISE else {"rank": int(key[2])}
        extend.extract(self.plan.model, self.path(self.needs(key)[0]), out, dtype="bfloat16",
                       seed=self.seed, **size)

    def _merge(self, key: Key, out: Path) -> None:
        _, _, rank, target, *bare = key
        source = self.path(self.needs(key)[0])
        target_path = self.path((target,) if target == SHIPPED else ("sibling", target))
        if rank == WHOLE:
            extend.merge(None, target_path, out, tuned=source, base=self.plan.model)
        else:
            extend.merge(source, target_path, out, sidecar=not bare)


def course(path: Path) -> dict[str, Any]:
    """Losses of a training: the mean of the first and of the last ten steps."""
    metrics = path / "metrics.jsonl"
    if not metrics.exists():
        return {}
    losses = [step["loss"] for line in metrics.read_text(encoding="utf-8").splitlines()
              if "loss" in (step := json.loads(line))]
    return {"first_loss": _mean(losses[:10]), "last_loss": _mean(losses[-10:])}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def adapter_bytes(path: Path) -> int | None:
    file = path / "adapter_model.safetensors"
    return file.stat().st_size if file.exists() else None


def unit_path(out: Path, unit: Unit) -> Path:
    return out / "results" / unit.group / unit.label


def open_units(units: Collection[Unit], out: Path, groups: set[str] | None) -> list[Unit]:
    return [unit for unit in units if (groups is None or unit.group in groups)
            and not (unit_path(out, unit) / UNIT).exists()]


def run_units(shop: Workshop, units: Sequence[Unit], clock: Clock, commit: str) -> list[str]:
    """Do units while there is time for the next; return the names of those that are left.

    A unit that does not fit any more is passed over for a shorter one. One that fails is told with
    its traceback, and the others are done all the same.
    """
    left = []
    for number, unit in enumerate(units):
        expected = unit.seconds + shop.seconds(unit.model)
        if not clock.has(expected):
            left.append(f"{unit.name} ({expected * clock.slowness:.0f} s)")
            continue
        begin = time.perf_counter()
        try:
            run_unit(shop, unit, commit)
        except TrainingError as error:
            say(f"{unit.name}: {error}")
            if str(error).startswith(STOPPED):
                return left + [f"{rest.name} ({STOPPED} a signal)" for rest in units[number:]]
            left.append(f"{unit.name} (error above)")
        except Exception:
            traceback.print_exc()
            left.append(f"{unit.name} (error above)")
        else:
            seconds = time.perf_counter() - begin
            clock.learn(expected, seconds)
            say(f"{unit.name}: {seconds:.1f} s, expected {expected:.0f}")
        free()
    return left


def run_unit(shop: Workshop, unit: Unit, commit: str) -> None:
    """Measure a model; rows that an interrupted call left are not measured again."""
    model, out = shop.make(unit.model), unit_path(shop.out, unit)
    begin = time.perf_counter()
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        extend.evaluate(model, out, tasks=list(unit.tasks), seed=shop.seed)
    write_json(out / UNIT, {"group": unit.group, "label": unit.label, "model": list(unit.model),
                            "seconds": time.perf_counter() - begin, **about(commit, shop.seed)})
    if unit.model[0] == "merged":  # of each there is one measure
        shutil.rmtree(model)


def about(commit: str, seed: int) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {"device": torch.cuda.get_device_name(0) if cuda else platform.machine(),
            "torch": torch.__version__, "transformers": transformers.__version__,
            "commit": commit, "seed": seed}


def free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(message: str) -> None:
    import sys

    print(message, file=sys.stderr, flush=True)
