"""Train the long models and the targets, once; later runs find them on disk."""

import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from make_demo_models import make_prose
from safetensors.torch import save_file
from safety_trials.longs import LONGS, TRAINED, train_long
from safety_trials.settings import Strength, make_settings
from safety_trials.siblings import draw_batches, fine_tune

from extend.model_config import read_config

from .bench import PROSE, Bench, folder_name
from .claims import Clock, claim
from .plan import Level, LongSpec, Target, say

WARMUP = 10  # steps
PROSE_PAGES = 300
EMBEDDINGS = "embed_tokens"


def make_longs(level_name: str, level: Level, out: Path, seed: int, steps: int | None,
               clock: Clock) -> None:
    """Train the long models that are not there and that no other process has begun."""
    for spec in level.longs:
        folder = out / "long" / folder_name(spec.name)
        if not folder.exists() and clock.has(level.long_seconds) and claim(out, folder.name):
            begin = time.perf_counter()
            make_long(level_name, level, spec, folder, seed, steps)
            say(f"long model {spec.name}: {time.perf_counter() - begin:.1f} s")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_long(level_name: str, level: Level, spec: LongSpec, folder: Path, seed: int,
              steps: int | None) -> None:
    native = read_config(level.model).rope
    setting = next(s for s in make_settings(native) if s.name == spec.setting)
    plan = replace(LONGS[level_name], steps=steps or LONGS[level_name].steps)
    folder.parent.mkdir(parents=True, exist_ok=True)
    trainable = (*TRAINED, EMBEDDINGS) if spec.embeddings else TRAINED
    train_long(str(level.model), setting, plan, str(level.long_text), native.original_len, folder,
               seed, trainable)


def make_targets(bench: Bench, clock: Clock) -> None:
    """Fine-tune on the skills that are not there and that no other process has begun."""
    expected = max(bench.level.steps) * bench.level.step_seconds
    for skill in bench.level.skills:
        there = all(bench.target_file(target).exists() for target in stations(bench.level, skill))
        if not there and clock.has(expected) and claim(bench.out, skill):
            begin = time.perf_counter()
            fine_tune_on(bench, skill)
            say(f"fine-tune on {skill}: {time.perf_counter() - begin:.1f} s")


def stations(level: Level, skill: str) -> list[Target]:
    return [Target(skill, steps) for steps in sorted(level.steps)]


def fine_tune_on(bench: Bench, skill: str) -> None:
    """Fine-tune on one skill; write the delta after each of the level's numbers of steps.

    The targets of a skill are stations of one fine-tune with a constant learning rate, after a
    warm-up of ten steps.
    """
    targets = {target.steps: target for target in stations(bench.level, skill)}
    last = max(targets)
    batches = draw_batches(bench.examples(targets[last], "train"), bench.level.step_tokens, last,
                           bench.seed, bench.device)
    bench.subject.set_rope(bench.native, bench.native.original_len)
    course = fine_tune(bench.subject, batches, Strength("constant", last, bench.level.lr),
                       lambda step: min(1.0, (step + 1) / WARMUP))
    for step, _ in enumerate(course, start=1):
        if step in targets:
            write_delta(bench, targets[step])


def make_factors(bench: Bench) -> None:
    """Decompose the deltas that are there and that no other process has begun on."""
    longs = [spec.name for spec in bench.level.longs if bench.long_folder(spec).exists()]
    targets = [target for skill in bench.level.skills for target in stations(bench.level, skill)
               if bench.target_file(target).exists()]
    for of in (*longs, *targets):
        path = bench.factor_file(of)
        if not path.exists() and claim(bench.out, path.name):
            bench.factors(of)


def write_delta(bench: Bench, target: Target) -> None:
    """Write what the model, as it is now, differs by; under its own name once it is complete."""
    path = bench.target_file(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: d.contiguous() for name, d in bench.subject.delta().items()}, partial)
    partial.replace(path)


def prose(seed: int, pages: int) -> str:
    """Made-up prose of the kind that the tiny base was trained on."""
    rng = random.Random(f"{seed}/transfer")
    return "".join(make_prose(rng) for _ in range(pages))


def write_prose(out: Path) -> None:
    """Text to hide passkeys in, where a level names none."""
    (out / PROSE).write_text(prose(0, PROSE_PAGES), encoding="utf-8")
