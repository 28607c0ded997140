"""What is trained and what is merged at each level, in order of what it tells.

A unit of work is (group of merges, target, long model). Units are done in the order given here, so
that a run whose time is up leaves the rows that tell most.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = "base"
ALONE = "alone"


@dataclass(frozen=True)
class LongSpec:
    """A long model: the base trained on long rows under another RoPE.

    Attributes:
        name: its label.
        setting: the RoPE, by its name in `safety_trials.settings`.
        embeddings: whether the embedding (and the tied head) is trained too.
    """

    name: str
    setting: str
    embeddings: bool = False


@dataclass(frozen=True)
class Target:
    """A model to merge into: the base (`skill` None), or a fine-tune of it on one skill."""

    skill: str | None = None
    steps: int = 0

    @property
    def name(self) -> str:
        return BASE if self.skill is None else f"{self.skill}, {self.steps} steps"


@dataclass(frozen=True)
class Level:
    """A size of the whole experiment.

    Attributes:
        model: the base.
        longs: the long models, the most telling first.
        skills: of the fine-tunes, the most telling first.
        steps: after how many steps of one fine-tune it is taken as a target.
        studied: of these, the one whose targets are studied closely: the skill is there, and the
            base's abilities are not yet gone.
        lr, step_tokens: of the fine-tunes.
        length: tokens at which passkeys are asked for in every trial.
        far: longer ones, for a few trials.
        depths: passkeys of each length and kind of text.
        text: files for the loss and the KL of short text.
        windows, window, stride: how it is cut and read.
        heldout: text that passkeys are hidden in; None: made-up prose.
        long_text: text that the long models are trained on.
        prompt_text: text that prompts of no skill are cut from; None: made-up prose.
        prompts: unlabelled prompts that learned merges are given.
        max_new: most tokens of an answer that the target writes to a prompt.
        keep_length: tokens of the rows by which learned merges keep the long context.
        limit: examples that a skill is scored on.
        batch_tokens: tokens of a forward in scoring.
        long_seconds, step_seconds, row_seconds: what a long model, a step of a fine-tune and a
            trial are expected to take.
    """

    model: Path
    longs: tuple[LongSpec, ...]
    skills: tuple[str, ...]
    steps: tuple[int, ...]
    studied: int
    lr: float
    step_tokens: int
    length: int
    far: tuple[int, ...]
    depths: int
    text: Path
    windows: int
    window: int
    stride: int
    heldout: Path | None
    long_text: Path
    prompt_text: Path | None
    prompts: int
    max_new: int
    keep_length: int
    limit: int
    batch_tokens: int
    long_seconds: float
    step_seconds: float
    row_seconds: float


LEVELS = {
    "tiny": Level(
        model=ROOT / "assets/demo/base",
        longs=(LongSpec("by-parts 1-4 x4", "by-parts 1-4 x4"),
               LongSpec("critical x4", "critical x4"), LongSpec("theta x160", "theta x128"),
               LongSpec("by-parts 1-4 x4, embeddings", "by-parts 1-4 x4", True)),
        skills=("reverse", "record"), steps=(10, 100, 300, 1000), studied=300, lr=2e-3,
        step_tokens=512, length=1024, far=(2048,), depths=10,
        text=ROOT / "data/skills/tiny/text.txt", windows=16, window=192, stride=4, heldout=None,
        long_text=ROOT / "assets/demo/notes.jsonl",
        prompt_text=None, prompts=32, max_new=40, keep_length=512, limit=100,
        batch_tokens=8192, long_seconds=35, step_seconds=0.06, row_seconds=1.5),
    "smollm2": Level(
        model=ROOT / "data/smollm2-135m-instruct",
        longs=(LongSpec("by-parts 1-32 x16", "by-parts 1-32 x16"),
               LongSpec("critical x16", "critical x16"), LongSpec("theta x160", "theta x128"),
               LongSpec("by-parts 1-32 x16, embeddings", "by-parts 1-32 x16", True),
               LongSpec("yarn x16", "yarn x16")),
        skills=("reverse", "record", "dates"), steps=(10, 100, 1000), studied=100, lr=1e-4,
        step_tokens=6144, length=32768, far=(65536, 131072), depths=10,
        text=ROOT / "data/text/heldout-prose/jargon-000-jargon-jargon.txt", windows=24, window=1024,
        stride=4,
        heldout=ROOT / "data/text/heldout-docs/linux-036-powerpc-associativity.txt",
        long_text=ROOT / "data/text/train/python-doc",
        prompt_text=ROOT / "data/text/train/handbook", prompts=48, max_new=64,
        keep_length=16384, limit=200, batch_tokens=32768,
        long_seconds=75, step_seconds=0.09, row_seconds=7),
}


@dataclass(frozen=True)
class Unit:
    """Merges of one group, of one target with one long model."""

    group: str
    target: Target
    long: str

    @property
    def name(self) -> str:
        return f"{self.group}, {self.target.name}, {self.long}"

    @property
    def file(self) -> str:
        return "--".join(part.replace(", ", "-").replace(" ", "-")
                         for part in (self.group, self.target.name, self.long)) + ".json"


def list_units(level: Level) -> Iterator[Unit]:
    """All units, the most telling first."""
    base = Target()
    plain = [long.name for long in level.longs if not long.embeddings]
    gentle, every_pair, far_theta = plain[:3]
    close = [Target(skill, level.studied) for skill in level.skills]
    others = [Target(skill, steps) for steps in sorted(level.steps, reverse=True)
              for skill in level.skills if steps != level.studied]
    for target in (*close, base, *others):
        yield Unit("alone", target, ALONE)
    yield from _units("main", (*close, base), plain[:3])
    yield from _units("norms", (base, close[0]), [gentle])
    yield from _units("mergers", close[:1], (every_pair, gentle, far_theta))
    yield from _units("rank", (base, close[0]), [gentle])
    yield from _units("learned", close[:2], (every_pair, far_theta))
    yield from _units("main", others, plain[:3])
    yield from _units("ablations", close[:1], (every_pair, gentle))
    yield from _units("mergers", others[:1], [every_pair])
    yield from _units("learned", others[:1], [every_pair])
    yield from _units("embeddings", (base, close[0]),
                      [long.name for long in level.longs if long.embeddings])
    yield from _units("learned", close[:1], [gentle])
    yield from _units("learned-other", close[:1], [every_pair])
    yield from _units("mergers", close[1:], (every_pair, gentle))
    yield from _units("far", close[:1], (every_pair, gentle))
    yield from _units("main", (*close, base), plain[3:])
    yield from _units("rank", close[1:2], [gentle])
    yield from _units("rank", (close[0], base), [every_pair])
    yield from _units("ablations", close[1:2], (every_pair, gentle))
    yield from _units("learned", close[2:], [every_pair])
    yield from _units("learned-other", close[1:2], [every_pair])
    yield from _units("learned-other", close[:1], [gentle])


def _units(group: str, targets: Sequence[Target], longs: Sequence[str]) -> Iterator[Unit]:
    return (Unit(group, target, long) for target in targets for long in longs)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
