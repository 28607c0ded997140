"""The trials of one process: the base, then its share of the siblings, under every RoPE."""

import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from extend.evaluate.score import proportion
from extend.evaluate.tasks.task import Prompt
from extend.model_config import read_config
from extend.output import write_json
from extend.tokenizer import load_tokenizer

from .diagnostics import add_noise, closed_form
from .longs import LongModel, LongPlan, PasskeyTest
from .scoring import Batch, keep_reference, make_batches, read_examples, score, text_batches
from .settings import NATIVE, Setting, Strength, make_settings
from .siblings import Subject, draw_batches, train_sibling

MERGE_WEIGHTS = (1.0, 0.5)
NOISE = {"smollm2": 0.005, "tiny": 0.1}  # drift of the base's random deltas, as siblings drift


@dataclass(frozen=True)
class Job:
    """What a process does: the base (`skill` None), or one sibling."""

    skill: str | None
    strength: Strength | None

    @property
    def cost(self) -> float:
        """Steps that it is worth, to share jobs out evenly."""
        return 300 if self.strength is None else self.strength.steps + 100

    @property
    def name(self) -> str:
        return "base" if self.strength is None else f"{self.skill}, {self.strength.name}"


def share_jobs(jobs: Sequence[Job], shards: int) -> list[list[Job]]:
    """Jobs of each of `shards` processes: the costliest first, each to the least busy."""
    shared: list[list[Job]] = [[] for _ in range(shards)]
    for job in sorted(jobs, key=lambda job: -job.cost):
        min(shared, key=lambda own: sum(j.cost for j in own)).append(job)
    return shared


def make_jobs(skills: Sequence[str], strengths: Sequence[Strength], scale: float) -> list[Job]:
    """The base, and every skill at every strength with `scale` times its steps."""
    return [Job(None, None), *(Job(skill, replace(s, steps=max(1, round(scale * s.steps))))
                               for skill in skills for s in strengths)]


class Bench:
    """The model, the data and the settings that all jobs of a process share."""

    def __init__(self, args: Any, plan: LongPlan, device: torch.device):
        self.args, self.device = args, device
        config = read_config(args.model)
        self.native = config.rope
        self.tokenizer = load_tokenizer(args.model)
        self.subject = Subject(config, str(args.model), device)
        self.settings = make_settings(self.native, args.factors)
        self.tests = {label: self._batches(path) for skill in args.skills
                      for label, path in self.test_files(skill).items()}
        self.text = text_batches(
            self.tokenizer, args.text, windows=args.windows, length=args.window, stride=args.stride,
            tokens=args.batch_tokens, device=device)
        self.lessons: dict[str, list[Prompt]] = {}
        self.longs: list[LongModel] = []
        self.passkey = (PasskeyTest(self.tokenizer, plan, args.passkey_text)
                        if args.passkeys else None)

    def test_files(self, skill: str) -> dict[str, Path]:
        """Label -> file of each test of a skill: its own, and the same over longer distances."""
        folder = self.args.skills_dir / self.args.level / skill
        files = {skill: folder / "test.jsonl", f"{skill}-far": folder / "far.jsonl"}
        return {label: path for label, path in files.items() if path.exists() or label == skill}

    def _batches(self, path: Path) -> list[Batch]:
        prompts = read_examples(self.tokenizer, path, self.args.limit)
        return make_batches(prompts, self.args.batch_tokens, self.device)

    def examples(self, skill: str) -> list[Prompt]:
        """What the siblings of a skill learn from; tokenised once."""
        if skill not in self.lessons:
            path = self.args.skills_dir / self.args.level / skill / "train.jsonl"
            self.lessons[skill] = read_examples(self.tokenizer, path)
        return self.lessons[skill]

    def put(self, setting: Setting) -> None:
        self.subject.set_rope(setting.spec, setting.factor * self.native.original_len)

    def each_setting(self) -> Iterator[Setting]:
        for setting in self.settings:
            self.put(setting)
            yield setting
        self.put(self.settings[0])

    def measure(self, test: str, reference: Sequence[torch.Tensor] | None) -> dict[str, Any]:
        """The skill of the model as it is now, by one of the tests."""
        found = score(self.subject.model, self.tests[test], reference)
        return {"right": found.right, **proportion(found.right, found.count),
                "loss": found.loss, "kl": found.kl}


def run_base(bench: Bench) -> dict[str, Any]:
    """Skills, text loss and KL of the base, and of the base with noise, under every RoPE."""
    subject, model = bench.subject, bench.subject.model
    subject.become()
    bench.put(bench.settings[0])
    known = {skill: keep_reference(model, batches) for skill, batches in bench.tests.items()}
    rows, text = [], keep_reference(model, bench.text)
    for setting in bench.each_setting():
        found = score(model, bench.text, text)
        skills = {skill: bench.measure(skill, known[skill]) for skill in bench.tests}
        rows.append({"setting": setting.name, "text_loss": found.loss, "text_kl": found.kl,
                     "skills": skills, **closed_form(bench.native, setting.spec)})
    subject.become((1.0, add_noise(subject.base, NOISE[bench.args.level], seed=0)))
    noisy = keep_reference(model, bench.text)
    for row, _ in zip(rows, bench.each_setting(), strict=True):
        row["noise_kl"] = score(model, bench.text, noisy).kl
    return {"rows": rows, "text_tokens": sum(len(batch.targets) for batch in bench.text)}


def run_longs(bench: Bench) -> list[dict[str, Any]]:
    """What the long models themselves can do."""
    found = []
    for long in bench.longs:
        bench.subject.become((1.0, long.delta))
        bench.subject.set_rope(long.rope, long.length)
        found.append({
            "name": long.name, "drift": bench.subject.drift(long.delta),
            "text_loss": score(bench.subject.model, bench.text).loss,
            "passkey": bench.passkey.score(bench.subject) if bench.passkey else None})
    bench.put(bench.settings[0])
    return found


def run_sibling(bench: Bench, job: Job) -> list[dict[str, Any]]:
    """Fine-tune one sibling, then score it under every RoPE and merged with every long model.

    Returns:
        One record for each test of the skill.
    """
    args, subject, strength = bench.args, bench.subject, job.strength
    batches = draw_batches(bench.examples(job.skill), args.step_tokens, strength.steps, args.seed,
                           bench.device)
    bench.put(bench.settings[0])
    trained = train_sibling(subject, batches, strength)
    delta = subject.delta()
    about = {"strength": asdict(strength), "drift": subject.drift(delta),
             "text_loss": score(subject.model, bench.text).loss, **trained,
             "passkey": bench.passkey.score(subject, 1) if asks_passkeys(bench, job) else None}
    known = {test: keep_reference(subject.model, bench.tests[test])
             for test in bench.test_files(job.skill)}
    rows: dict[str, list[dict[str, Any]]] = {test: [] for test in known}
    for setting in bench.each_setting():
        for test, reference in known.items():
            rows[test].append({"setting": setting.name, **bench.measure(test, reference)})
    merged = merge(bench, job, delta, known)
    return [{"sibling": f"{test}, {strength.name}", "skill": test, **about, "rows": rows[test],
             "merged": merged[test]} for test in known]


def asks_passkeys(bench: Bench, job: Job) -> bool:
    """Passkeys take longer than skills: one strength is enough."""
    return bench.passkey is not None and job.strength.name == "medium"


def merge(bench: Bench, job: Job, delta: dict[str, torch.Tensor],
          known: dict[str, list[torch.Tensor]]) -> dict[str, list[dict[str, Any]]]:
    """Base + sibling's delta + weight x long model's delta, under each long model's RoPE."""
    found: dict[str, list[dict[str, Any]]] = {test: [] for test in known}
    if job.strength.part != "all":
        return found
    for long in bench.longs:
        bench.subject.set_rope(long.rope, long.length)
        for weight in MERGE_WEIGHTS:
            bench.subject.become((1.0, delta), (weight, long.delta))
            asked = asks_passkeys(bench, job) and weight == 1
            keys = bench.passkey.score(bench.subject) if asked else None
            for test, reference in known.items():
                found[test].append({"long": long.name, "weight": weight, "passkey": keys,
                                    **bench.measure(test, reference)})
    bench.put(bench.settings[0])
    return found


def run_jobs(bench: Bench, jobs: Sequence[Job], out: Path) -> None:
    """Do the jobs and write `out` after each, so that an interrupted run leaves what it has."""
    found: dict[str, Any] = {"schema": 1, "level": bench.args.level, "about": about(bench),
                             "settings": [setting.record() for setting in bench.settings],
                             "base": None, "longs": [], "siblings": []}
    for job in jobs:
        begin = time.perf_counter()
        if job.strength is None:
            found["base"], found["longs"] = run_base(bench), run_longs(bench)
        else:
            found["siblings"] += run_sibling(bench, job)
        write_json(out, found)
        print(f"{out.stem}: {job.name} {time.perf_counter() - begin:.1f} s{summary(found, job)}",
              file=sys.stderr, flush=True)


def summary(found: dict[str, Any], job: Job) -> str:
    """The drift of the sibling of `job`, and its skill by each test under its own RoPE."""
    own = [s for s in found["siblings"] if job.strength is not None
           and s["sibling"] in (job.name, f"{job.skill}-far, {job.strength.name}")]
    return "".join(f", {s['skill']} {native_row(s)['score']:.2f} at drift {s['drift']:.4f}"
                   for s in own)


def native_row(sibling: dict[str, Any]) -> dict[str, Any]:
    """The sibling under the RoPE that it was trained under."""
    return next(row for row in sibling["rows"] if row["setting"] == NATIVE)


def about(bench: Bench) -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    args, cuda = bench.args, bench.device.type == "cuda"
    return {"model": "/".join(args.model.parts[-2:]), "command": " ".join(sys.argv),
            "commit": args.commit,
            "native_len": bench.native.original_len, "rope_theta": bench.native.rope_theta,
            "device": torch.cuda.get_device_name(0) if cuda else platform.machine(),
            "torch": torch.__version__, "transformers": transformers.__version__,
            "seed": args.seed, "step_tokens": args.step_tokens,
            "steps_scale": args.steps_scale, "noise": NOISE[args.level]}
