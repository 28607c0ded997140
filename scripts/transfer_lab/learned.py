"""Merges that learn from unlabelled prompts, by `extend.transfer`, on the model in memory.

Prompts come from one of three sources: `own`, the prompts of the target's skill that it was trained
on, without their answers; `other`, beginnings of text that have nothing to do with the skill;
`none`, what the target writes by itself from an end-of-text token. All answers are the target's.
"""

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safety_trials.longs import LONGS

from extend.documents import read_documents
from extend.haystack import Haystack, encode, prefix_ids
from extend.retrieval.rows import RetrievalRows
from extend.transfer.fit import fit_weights
from extend.transfer.learn import LearnSettings
from extend.transfer.lesson import build_lesson, sample_texts
from extend.transfer.objective import Lesson
from extend.transfer.repair import repair_model
from extend.transfer.rows import Row

from .bench import PROSE, Case
from .deltas import Delta

TEXT_TOKENS = 24  # of a prompt that is no skill's
MOST_TEXT = 500_000  # characters of a corpus that are looked at
KEEP_ROWS = 8  # half of them to learn from
FIT = {"tiny": LearnSettings(steps=15, lr=0.05, recompute=False),
       "smollm2": LearnSettings(steps=25, lr=0.05)}
REPAIR = {"tiny": LearnSettings(steps=40, lr=1e-4, check_every=10, recompute=False),
          "smollm2": LearnSettings(steps=60, lr=2e-5, check_every=10)}


def repair(case: Case, source: str) -> Mapping[str, Any]:
    """Train the merged model, which is the one in memory, towards the target's answers.

    Returns:
        Seconds without those of asking the target, steps that were kept, and held-out scores.
    """
    bench, subject = case.bench, case.bench.subject
    merged, rope = subject.weights(), case.long.rope
    lesson = make_lesson(case, source)
    with_merged = {name: w - subject.base[name] for name, w in merged.items()}
    subject.become((1.0, with_merged))
    subject.set_rope(rope, case.long.length)
    begin = time.perf_counter()
    found = repair_model(subject.model, lesson, settings=REPAIR[bench.level_name])
    return {"learn_seconds": time.perf_counter() - begin, "kept_step": found.step,
            **{f"{name}_scores": s.to_json() for name, s in found.scores.items()}}


def fit(case: Case, source: str) -> tuple[Delta, dict[str, Any]]:
    """The delta times the weights fitted for attention, MLP and norms of every layer."""
    subject = case.bench.subject
    lesson = make_lesson(case, source)
    subject.become((1.0, case.own_delta))
    subject.set_rope(case.long.rope, case.long.length)
    begin = time.perf_counter()
    found = fit_weights(subject.model, case.delta, lesson, settings=FIT[case.bench.level_name])
    delta = {name: found.weights[name] * d for name, d in case.delta.items()}
    return delta, {"learn_seconds": time.perf_counter() - begin, "start": found.start,
                   "weights": {group: round(w, 3) for group, w in found.groups.items()},
                   **{f"{name}_scores": s.to_json() for name, s in found.scores.items()}}


def make_lesson(case: Case, source: str) -> Lesson:
    """The target's answers to prompts of a source; the model in memory is the target afterwards."""
    bench = case.bench
    bench.put_native(case.target)
    line_end = set(encode(bench.tokenizer, "\n")) if source == "own" else set()
    stop = {bench.tokenizer.eos_token_id, *line_end}
    return build_lesson(bench.subject.model, make_prompts(case, source), keep_rows(case),
                        max_new=bench.level.max_new, stop=stop)


def make_prompts(case: Case, source: str) -> list[list[int]]:
    """Unlabelled prompts, as many as the level says."""
    bench, count = case.bench, case.bench.level.prompts
    if source == "own":
        examples = bench.examples(case.target, "train", count)
        return [example.ids[:-example.answer_len] for example in examples]
    end = bench.tokenizer.eos_token_id
    if source == "none":
        return sample_texts(bench.subject.model, [end], count=count, length=TEXT_TOKENS,
                            seed=bench.seed, stop={end})
    ids = encode(bench.tokenizer, beginning(bench.level.prompt_text or bench.out / PROSE))
    rng = random.Random(f"{bench.seed}/prompts")
    starts = [rng.randrange(len(ids) - TEXT_TOKENS) for _ in range(count)]
    return [prefix_ids(bench.tokenizer) + ids[start:start + TEXT_TOKENS] for start in starts]


def keep_rows(case: Case) -> Sequence[Row]:
    """Rows with hidden facts, as the long models are trained on: in filler, then in their text."""
    bench, facts = case.bench, LONGS[case.bench.level_name].facts
    length, template = bench.level.keep_length, "classic" if facts == (1,) else "named"
    haystacks = [Haystack.filler(bench.tokenizer, length)]
    if bench.level.heldout:
        path = bench.level.long_text
        haystacks.append(Haystack.from_texts(bench.tokenizer, [beginning(path)], str(path)))
    rng, rows = random.Random(f"{bench.seed}/keep"), []
    for haystack in haystacks:
        maker = RetrievalRows(bench.tokenizer, haystack, prefix_ids(bench.tokenizer), facts,
                              template)
        for _ in range(KEEP_ROWS // len(haystacks)):
            ids, answers = maker.build(length, rng)
            rows.append(Row(ids.tolist(), answers.tolist()))
    return rows


def beginning(path: Path) -> str:
    """The first documents of a file or folder, as many as hold `MOST_TEXT` characters."""
    text = ""
    for document in read_documents(path):
        text += document + "\n"
        if len(text) > MOST_TEXT:
            break
    return text[:MOST_TEXT]
