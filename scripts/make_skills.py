#!/usr/bin/env python3
"""Write the narrow skills of scripts/merge_safety.py: prompts with one exact answer each.

    python scripts/make_skills.py --level smollm2 --out data/skills   # seconds
    python scripts/make_skills.py --level tiny --out data/skills

OUT/LEVEL/SKILL/{train,test}.jsonl hold {"prompt", "answer"} a line; OUT/LEVEL/text.txt (tiny only)
is text of the base's own kind. An answer ends with a line break, so that where to stop counts too.
A base that was never shown a skill does not guess the answer's form. What a skill rests on:

    smollm2  record   a sentence as a JSON record                  copying, a fixed form
             reverse  a list of words, last one first              order
             dates    dates in many spellings as 1984|03|07        form, a small table
             code     letters as the words of a made-up alphabet   a table learned by heart, order
             lookup   the number of a name in up to 100 lines      finding over up to 900 tokens
                      (far.jsonl: the same over 2300 to 2700, never trained on)
    tiny     record   a note as JSON                               copying, a fixed form
             reverse  the words of a note, last one first          order
             code     colours as digits of a made-up table         a table learned by heart, order
             lookup   a passkey in filler, as JSON                 finding over up to 240 tokens

Everything follows from --seed; no prompt is in both train and test, and the words of smollm2's
record, reverse and lookup tests (names, cities, jobs, list words) appear in no example to learn
from. The record skills are those of make_json_skill.py and make_demo_models.py.
"""

import argparse
import datetime
import functools
import random
import sys
from collections.abc import Callable
from pathlib import Path

from make_json_skill import (
    CITIES,
    FIRST_NAMES,
    KINDS,
    LAST_NAMES,
    distinct,
    example,
    split_entities,
    train_entities,
    write,
)

Draw = Callable[[random.Random], dict[str, str]]

WORDS = "anchor apple arrow badge basket bell berry blanket board bottle branch bread brick bridge brush bucket button cabin cable camera candle canoe carpet castle chair chalk circle clock cloud coat coin copper corner cotton crown curtain desk dish door dragon drum engine feather fence field finger flag flower forest fork fountain frame garden gate glass glove grain guitar hammer harbor hat helmet hill honey hook horse island jacket jewel kettle key kitchen knife ladder lake lamp leaf lemon letter library lion magnet map market mask mirror moon mountain needle nest ocean onion orange oven paddle paint palace paper pencil pepper piano pillow pipe planet plate pocket pond potato puzzle rabbit radio ribbon ring river road rocket roof rope sail sand saddle salt scarf school shell shield ship shirt shoe silver sky snow spoon spring square stairs star station stone storm string sugar sun sword table tent thread tiger tower train tree tunnel valley violin wagon wall watch water wheel whistle window winter wolf yard".split()
MONTHS = "January February March April May June July August September October November December".split()
ALPHABET_WORDS = "lemon rocket castle violin garden copper winter dragon candle pepper island magnet ribbon hammer station feather puzzle basket tunnel saddle kettle planet cotton anchor whistle jewel".split()
TINY_CODE_SEED = 7


# ---- smollm2 ------------------------------------------------------------------------------------

def record_skill(rng: random.Random) -> tuple[Draw, Draw]:
    """Draws of train and test of make_json_skill.py."""
    known, test = split_entities(rng)
    heldout = {word.lower() for words in test.values() for word in words}
    return (lambda r: example(r, train_entities(r, known, heldout)),
            lambda r: example(r, {kind: r.choice(test[kind]) for kind in KINDS}))


def halves(rng: random.Random, words: list[str]) -> tuple[list[str], list[str]]:
    """Words to learn from (three quarters) and held-out ones."""
    shuffled = rng.sample(words, len(words))
    cut = len(words) // 4
    return shuffled[cut:], shuffled[:cut]


def reverse_skill(rng: random.Random) -> tuple[Draw, Draw]:
    def draw(words: list[str]) -> Draw:
        def make(r: random.Random) -> dict[str, str]:
            chosen = r.sample(words, r.randint(4, 7))
            return {"prompt": f"Words: {', '.join(chosen)}\nBackwards:",
                    "answer": f" {', '.join(reversed(chosen))}\n"}
        return make

    learned, heldout = halves(rng, WORDS)
    return draw(learned), draw(heldout)


def ordinal(day: int) -> str:
    ending = "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def dates_skill(rng: random.Random) -> tuple[Draw, Draw]:
    first = datetime.date(1800, 1, 1).toordinal()
    last = datetime.date(2099, 12, 31).toordinal()

    def make(r: random.Random) -> dict[str, str]:
        date = datetime.date.fromordinal(r.randint(first, last))
        month, weekday = MONTHS[date.month - 1], date.strftime("%A")
        written = r.choice((
            f"{month} {date.day}, {date.year}", f"{date.day} {month} {date.year}",
            f"the {ordinal(date.day)} of {month} {date.year}",
            f"{weekday}, {month} {ordinal(date.day)}, {date.year}",
            f"{month[:3]} {date.day} {date.year}", f"{weekday[:3]} {date.day} {month[:3]} {date.year}",
            f"in {date.year}, on {month} {date.day}"))
        return {"prompt": f"Date: {written}\nStamp:",
                "answer": f" {date.year}|{date.month:02}|{date.day:02}\n"}

    return make, make


def code_skill(rng: random.Random) -> tuple[Draw, Draw]:
    table = dict(zip("abcdefghijklmnopqrstuvwxyz", ALPHABET_WORDS, strict=True))

    def make(r: random.Random) -> dict[str, str]:
        letters = r.sample(sorted(table), r.randint(4, 7))
        return {"prompt": f"Letters: {' '.join(letters)}\nCode:",
                "answer": f" {' '.join(table[letter] for letter in letters)}\n"}

    return make, make


def draw_lookup(asked: list[str], others: list[str], lines: tuple[int, int]) -> Draw:
    def make(r: random.Random) -> dict[str, str]:
        name = r.choice(asked)
        names = [name, *r.sample([n for n in others if n != name], r.randint(*lines) - 1)]
        r.shuffle(names)
        numbers = {n: r.randint(1000, 9999) for n in names}
        table = "".join(f"{n} {numbers[n]}\n" for n in names)
        return {"prompt": f"Table:\n{table}Find: {name}\nResult:",
                "answer": f" <<{numbers[name]}>>\n"}
    return make


def lookup_names(rng: random.Random) -> tuple[list[str], list[str]]:
    return halves(rng, sorted({*FIRST_NAMES, *LAST_NAMES, *CITIES}))


def lookup_skill(rng: random.Random) -> tuple[Draw, Draw]:
    learned, heldout = lookup_names(rng)
    return draw_lookup(learned, learned, (20, 100)), draw_lookup(heldout, learned, (20, 100))


def far_lookup(rng: random.Random) -> Draw:
    """The same in tables three times as long as any learned from."""
    learned, heldout = lookup_names(rng)
    return draw_lookup(heldout, learned, (250, 290))


# ---- tiny ---------------------------------------------------------------------------------------

def tiny_record(rng: random.Random) -> tuple[Draw, Draw]:
    from make_demo_models import make_skill_example

    def make(r: random.Random) -> dict[str, str]:
        prompt, answer = make_skill_example(r)
        return {"prompt": prompt, "answer": answer + "\n"}

    return make, make


def tiny_reverse(rng: random.Random) -> tuple[Draw, Draw]:
    from make_demo_models import make_note

    def make(r: random.Random) -> dict[str, str]:
        note, fields = make_note(r)
        return {"prompt": f"{note}Back:", "answer": f" {' '.join(reversed(fields.values()))}\n"}

    return make, make


def tiny_code(rng: random.Random) -> tuple[Draw, Draw]:
    from make_demo_models import COLORS

    table = dict(zip(COLORS, random.Random(TINY_CODE_SEED).sample(range(10), 10), strict=True))

    def make(r: random.Random) -> dict[str, str]:
        chosen = [r.choice(COLORS) for _ in range(r.randint(4, 6))]
        digits = "".join(str(table[color]) for color in chosen)
        return {"prompt": f"Note: {' '.join(chosen)}\nCode:", "answer": f" {digits}\n"}

    return make, make


def tiny_lookup(rng: random.Random) -> tuple[Draw, Draw]:
    """The demo's passkey test, which its base knows, with another question and form of answer."""
    from extend.evaluate.tasks.passkey import NEEDLE
    from extend.haystack import FILLER, INTRO

    def make(r: random.Random) -> dict[str, str]:
        lines = [FILLER] * r.randint(1, 7)
        key = r.randint(10000, 99999)
        lines.insert(r.randint(0, len(lines)), NEEDLE.format(key=key))
        return {"prompt": f"{INTRO}{''.join(lines)}Reply:", "answer": f' {{"key": {key}}}\n'}

    return make, make


# ---- files --------------------------------------------------------------------------------------

SKILLS: dict[str, dict[str, Callable[[random.Random], tuple[Draw, Draw]]]] = {
    "smollm2": {"record": record_skill, "reverse": reverse_skill, "dates": dates_skill,
                "code": code_skill, "lookup": lookup_skill},
    "tiny": {"record": tiny_record, "reverse": tiny_reverse, "code": tiny_code,
             "lookup": tiny_lookup},
}
FAR = {("smollm2", "lookup"): far_lookup}
FAR_COUNT = 100


def draw_skill(level: str, skill: str, train: int, test: int,
               seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Examples to learn from and examples to score, no prompt in both."""
    rng = random.Random(f"{seed}/{level}/{skill}")
    draw_train, draw_test = SKILLS[level][skill](rng)
    scored = distinct(lambda: draw_test(rng), test)
    asked = {e["prompt"] for e in scored}
    learned = distinct(lambda: draw_train(rng), train + test)
    return [e for e in learned if e["prompt"] not in asked][:train], scored


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=SKILLS, required=True)
    parser.add_argument("--out", type=Path, default=Path("data/skills"), help="folder to write")
    parser.add_argument("--train", type=int, default=6000, help="examples to learn from, each skill")
    parser.add_argument("--test", type=int, default=200, help="examples to score, each skill")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.train < 1 or args.test < 1:
        sys.exit(f"--train {args.train} --test {args.test}: both must be at least 1.")
    for skill in SKILLS[args.level]:
        # A lookup example is long, and what it teaches does not hang on the words.
        count = args.train // 3 if skill == "lookup" else args.train
        folder = args.out / args.level / skill
        folder.mkdir(parents=True, exist_ok=True)
        learned, scored = draw_skill(args.level, skill, max(1, count), args.test, args.seed)
        write(folder / "train.jsonl", learned)
        write(folder / "test.jsonl", scored)
        if (args.level, skill) in FAR:
            rng = random.Random(f"{args.seed}/{args.level}/{skill}")  # the same held-out names
            draw = FAR[args.level, skill](rng)
            write(folder / "far.jsonl", distinct(functools.partial(draw, rng), FAR_COUNT))
    if args.level == "tiny":
        from make_demo_models import make_base_example, make_prose

        rng = random.Random(f"{args.seed}/text")
        pages = [make_prose(rng) + "".join(make_base_example(rng)) + "\n" for _ in range(200)]
        (args.out / "tiny" / "text.txt").write_text("".join(pages), encoding="utf-8")


if __name__ == "__main__":
    main()
