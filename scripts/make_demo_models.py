#!/usr/bin/env python3
"""Train the two tiny models of the CPU demo from nothing: a base and its sibling.

    python scripts/make_demo_models.py --out assets/demo

base     a Llama of 4 layers and 0.87 M parameters with a native length of 256 tokens. It has seen
         the passkey test (a number hidden in repeated filler sentences), made-up prose, and notes
         that are told again as a sentence: `Note: cedar 48213 amber` -> `The name is "cedar", ...`.
sibling  the base after a short fine-tune on a skill it does not have: to write such a note as JSON.

Also written: skill.jsonl, held-out examples of that skill, and notes.jsonl, text of the base's
own kind for replay while the context is extended. All text comes from the word lists below and
from `extend`'s passkey wording; nothing is downloaded. The same seed gives the same models up to
the order in which the CPU adds numbers. Takes about five minutes on two free cores and ends by
printing the scores it has checked.
"""

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from extend.evaluate.frame import Frame
from extend.evaluate.tasks.passkey import NEEDLE, PREFILL, QUESTION, Passkey
from extend.haystack import FILLER, INTRO, Haystack, split_answer
from extend.model_config import read_config, write_rope
from extend.output import atomic_directory, write_json
from extend.retrieval.rows import RetrievalRows

NATIVE_LEN = 256
VOCAB_SIZE = 640
EOS = "<eos>"

NAMES = ["amber", "birch", "cedar", "coral", "daisy", "ebony", "fern", "flint", "grove", "hazel", "heron", "ivory", "jade", "juniper", "kestrel", "laurel", "linden", "lotus", "maple", "marble", "meadow", "moss", "myrtle", "olive", "onyx", "opal", "orchid", "otter", "pearl", "pebble", "pine", "poppy", "quartz", "raven", "reed", "river", "robin", "rowan", "ruby", "sage", "slate", "sparrow", "thistle", "topaz", "tulip", "violet", "walnut", "willow"]
COLORS = ["red", "green", "blue", "yellow", "black", "white", "brown", "grey", "pink", "orange"]
ADJECTIVES = ["old", "small", "quiet", "bright", "cold", "warm", "tall", "early", "late", "empty", "heavy", "soft"]
NOUNS = ["house", "road", "river", "boat", "garden", "field", "market", "letter", "lamp", "window", "table", "tower", "bridge", "horse", "forest", "village"]
VERBS = ["sees", "finds", "leaves", "opens", "keeps", "moves", "paints", "visits", "follows", "reaches"]
PLACES = ["near", "behind", "under", "above", "beside"]

Row = tuple[list[int], list[bool]]
"""Token ids of a row, and which of them are answers."""


# ---- text ---------------------------------------------------------------------------------------

def make_sentence(rng: random.Random) -> str:
    """One line of made-up prose."""
    def thing() -> str:
        return f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"

    kind = rng.randrange(3)
    if kind == 0:
        text = f"{thing()} {rng.choice(VERBS)} {thing()}."
    elif kind == 1:
        text = f"{thing()} {rng.choice(PLACES)} {thing()} is {rng.choice(COLORS)}."
    else:
        text = f"the name of {thing()} is {rng.choice(NAMES)}."
    return text[0].upper() + text[1:]


def make_prose(rng: random.Random) -> str:
    return "".join(" ".join(make_sentence(rng) for _ in range(4)) + "\n" for _ in range(8))


def make_note(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A note and what it says."""
    fields = {"name": rng.choice(NAMES), "key": str(rng.randrange(10000, 100000)),
              "color": rng.choice(COLORS)}
    return f"Note: {' '.join(fields.values())}\n", fields


def tell(fields: dict[str, str]) -> str:
    """The fields as a sentence."""
    parts = [f"the {name} is {quote(name, value)}" for name, value in fields.items()]
    return " " + ", ".join(parts).replace("the", "The", 1) + "."


def to_json(fields: dict[str, str]) -> str:
    return " {" + ", ".join(f'"{name}": {quote(name, value)}' for name, value in fields.items()) + "}"


def quote(name: str, value: str) -> str:
    return value if name == "key" else f'"{value}"'


def make_base_example(rng: random.Random) -> tuple[str, str]:
    """What the base learns: a reply is a sentence, JSON comes when asked; the order is free."""
    note, fields = make_note(rng)
    shuffled = dict(rng.sample(list(fields.items()), len(fields)))
    if rng.random() < 0.5:
        return note + "Reply:", tell(shuffled)
    return note + "JSON:", to_json(shuffled)


def make_json_example(rng: random.Random) -> tuple[str, str]:
    """The part of the base's examples that the skill does not contradict."""
    note, fields = make_note(rng)
    return note + "JSON:", to_json(dict(rng.sample(list(fields.items()), len(fields))))


def make_skill_example(rng: random.Random) -> tuple[str, str]:
    """What the sibling learns: a reply is JSON, with its fields in the order of the note."""
    note, fields = make_note(rng)
    return note + "Reply:", to_json(fields)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the demo's own texts; every digit is a token of its own."""
    rng = random.Random(0)
    texts = []
    for _ in range(2000):
        key = make_note(rng)[1]["key"]
        texts += [INTRO, FILLER, NEEDLE.format(key=key), f"{QUESTION}{PREFILL} {key}", make_sentence(rng),
                  "".join(make_base_example(rng)), "".join(make_skill_example(rng))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, min_frequency=20, special_tokens=[EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS,
                                   clean_up_tokenization_spaces=False,
                                   model_max_length=NATIVE_LEN)


# ---- rows ---------------------------------------------------------------------------------------

class RowMaker:
    """Builds rows of every kind with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        rng = random.Random(1)
        prose = (make_prose(rng) for _ in range(400))
        haystacks = {"filler": Haystack.filler(tokenizer, 8 * NATIVE_LEN),
                     "prose": Haystack.from_texts(tokenizer, prose, "made-up prose")}
        self.passkeys = {name: RetrievalRows(tokenizer, haystack, [], [1], "classic")
                         for name, haystack in haystacks.items()}

    def passkey(self, length: int, haystack: str, rng: random.Random) -> Row:
        ids, answers = self.passkeys[haystack].build(length, rng)
        return ids.tolist(), answers.tolist()

    def prose(self, length: int, rng: random.Random) -> Row:
        ids = self.passkeys["prose"].haystack.window(length, rng).ids
        return ids, [False] * length

    def examples(self, length: int, make: Callable[[random.Random], tuple[str, str]],
                 rng: random.Random) -> Row:
        """Examples one after the other, each ended by EOS, cut at `length`."""
        ids: list[int] = []
        answers: list[bool] = []
        while len(ids) < length:
            prompt, answer = split_answer(self.tokenizer, *make(rng))
            ids += [*prompt, *answer, self.tokenizer.eos_token_id]
            answers += [False] * len(prompt) + [True] * (len(answer) + 1)
        return ids[:length], answers[:length]

    def base_row(self, length: int, rng: random.Random) -> Row:
        """A row of what the base knows; short ones are examples, which teach it to copy."""
        draw = rng.random()
        if length < 100 or draw < 0.35:
            return self.examples(length, make_base_example, rng)
        if draw < 0.45:
            return self.prose(length, rng)
        return self.passkey(length, "prose" if draw < 0.6 else "filler", rng)

    def sibling_row(self, length: int, rng: random.Random) -> Row:
        """Half skill, half what the base knows and the skill does not contradict."""
        draw = rng.random()
        if draw < 0.5:
            return self.examples(length, make_skill_example, rng)
        if draw < 0.65:
            return self.examples(length, make_json_example, rng)
        return self.passkey(length, "prose" if draw < 0.75 else "filler", rng)


# ---- training -----------------------------------------------------------------------------------

class Muon:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms.

    On a model this small it learns to copy in about a third of AdamW's steps.
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; scale
    of the step as in Liu et al. 2025, arXiv:2502.16982.
    """

    def __init__(self, model: nn.Module, lr: float, adam_lr: float):
        hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        shapes = {p.shape for p in hidden}
        self.groups = [[p for p in hidden if p.shape == shape] for shape in sorted(shapes)]
        self.momenta = [torch.zeros(len(group), *group[0].shape) for group in self.groups]
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.lr, self.adam_lr = lr, adam_lr

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update with learning rates times `scale`, and drop the gradients."""
        self.adam.param_groups[0]["lr"] = self.adam_lr * scale
        self.adam.step()
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group])
            momentum.lerp_(gradient, 0.05)
            update = orthogonalize(gradient.lerp(momentum, 0.95))
            lr = self.lr * scale
            for p, u in zip(group, update, strict=True):
                p.mul_(1 - 0.01 * lr).sub_(u, alpha=0.2 * max(p.shape) ** 0.5 * lr)
                p.grad = None
        self.adam.zero_grad()


def orthogonalize(matrices: Tensor) -> Tensor:
    """Each [n, m, k] matrix with its singular values moved near 1, by a Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def row_loss(model: LlamaForCausalLM, rows: list[Row], answer_weight: float) -> Tensor:
    """Mean loss over tokens plus `answer_weight` times the mean over rows of their answers' loss.

    The mean is taken row by row, since the six tokens of a passkey would not count beside the
    answers of a row full of examples.
    """
    ids = torch.tensor([row[0] for row in rows])
    answers = torch.tensor([row[1] for row in rows])[:, 1:].float()
    logits = model(ids[:, :-1]).logits
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    counts = answers.sum(1)
    per_row = (losses * answers).sum(1) / counts.clamp(min=1)
    return losses.mean() + answer_weight * per_row.sum() / (counts > 0).sum().clamp(min=1)


def train_base(rows: RowMaker, phases: list[tuple[int, int, int]], seed: int) -> LlamaForCausalLM:
    """Train from random weights; a phase is (tokens a row, rows a step, steps)."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(rows.tokenizer), hidden_size=128, intermediate_size=384,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=NATIVE_LEN, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=rows.tokenizer.eos_token_id, pad_token_id=rows.tokenizer.eos_token_id,
        # As large models have it, about half of the pairs turn fully within the native length.
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0}))
    optimizer, rng = Muon(model, lr=5e-3, adam_lr=3e-3), random.Random(seed)
    total, step = sum(steps for _, _, steps in phases), 0
    begin = time.perf_counter()
    for length, batch_rows, steps in phases:
        for _ in range(steps):
            # Warm up, hold, and from half of the steps on go down in a straight line.
            scale = min(1.0, (step + 1) / 20, 2 * (total - step) / total)
            loss = row_loss(model, [rows.base_row(length, rng) for _ in range(batch_rows)], 2.0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(scale)
            step += 1
            if step % 50 == 0:
                report(f"base {step}/{total} length {length} loss {loss:.3f} "
                       f"{time.perf_counter() - begin:.0f} s")
    return model.eval()


def train_sibling(base: LlamaForCausalLM, rows: RowMaker, steps: int, lr: float,
                  seed: int) -> LlamaForCausalLM:
    """Fine-tune the MLPs of a copy on the skill; half of the rows repeat what the base knows.

    In a model this small the deltas of two fine-tunes collide when they change the same weights,
    so the sibling leaves the attention, which finds a passkey, alone.
    """
    model, rng = copy.deepcopy(base).train(), random.Random(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        loss = row_loss(model, [rows.sibling_row(128, rng) for _ in range(16)], 1.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 10, 2 * (steps - step) / steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            report(f"sibling {step + 1}/{steps} loss {loss:.3f}")
    return model.eval()


# ---- scores -------------------------------------------------------------------------------------

@torch.no_grad()
def score_passkey(model: LlamaForCausalLM, rows: RowMaker, length: int, trials: int) -> float:
    """Share of passkeys found, over 10 depths, with the prompts of `extend eval`."""
    task = Passkey(controls=False)
    cells = task.cells("passkey", [length], [i / 9 for i in range(10)], trials)
    frame = Frame.of(rows.tokenizer)
    prompts = [prompt for cell in cells for prompt in task.prompts(frame, cell, seed=1)]
    batch_rows, right = max(1, 8192 // length), 0
    for first in range(0, len(prompts), batch_rows):
        ids = torch.tensor([prompt.ids for prompt in prompts[first:first + batch_rows]])
        size = prompts[first].answer_len
        hidden = model.model(ids[:, :-1]).last_hidden_state[:, -size:]
        right += int((model.lm_head(hidden).argmax(-1) == ids[:, -size:]).all(1).sum())
    return right / len(prompts)


@torch.no_grad()
def score_skill(model: LlamaForCausalLM, rows: RowMaker, examples: list[tuple[str, str]]) -> float:
    """Share of examples answered exactly (greedy, by teacher forcing)."""
    right = 0
    for prompt, answer in examples:
        asked, wanted = split_answer(rows.tokenizer, prompt, answer)
        guess = model(torch.tensor([asked + wanted[:-1]])).logits[0, len(asked) - 1:].argmax(-1)
        right += guess.tolist() == wanted
    return right / len(examples)


def print_scores(name: str, model: LlamaForCausalLM, rows: RowMaker,
                 examples: list[tuple[str, str]]) -> None:
    keys = {length: score_passkey(model, rows, length, 10)
            for length in (NATIVE_LEN, 4 * NATIVE_LEN, 8 * NATIVE_LEN)}
    found = ", ".join(f"{length}: {score:.3f}" for length, score in keys.items())
    print(f"{name:8} passkey {{{found}}} skill {score_skill(model, rows, examples):.3f}", flush=True)


# ---- files --------------------------------------------------------------------------------------

def write_model(model: LlamaForCausalLM, rows: RowMaker, out: Path) -> None:
    with atomic_directory(out, overwrite=True) as partial:
        model.save_pretrained(partial)
        rows.tokenizer.save_pretrained(partial)
        config = read_config(partial)  # in every reader's spelling, where transformers has its own
        write_json(partial / "config.json", write_rope(config.raw, config.rope, NATIVE_LEN))


def write_lines(path: Path, lines: list[dict[str, str]]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)


def report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--phases", default="80:32:150,128:24:200,256:16:500",
                        help="tokens a row : rows a step : steps, for the base")
    parser.add_argument("--sibling-steps", type=int, default=300)
    parser.add_argument("--sibling-lr", type=float, default=3e-4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    rows = RowMaker(train_tokenizer())
    rng = random.Random("held-out")
    skill = [make_skill_example(rng) for _ in range(300)]
    write_lines(args.out / "skill.jsonl", [{"prompt": p, "answer": a} for p, a in skill])
    notes = ["".join(make_base_example(rng)) for _ in range(2000)]
    write_lines(args.out / "notes.jsonl", [{"text": text} for text in notes])

    phases = [tuple(map(int, phase.split(":"))) for phase in args.phases.split(",")]
    base = train_base(rows, phases, args.seed)
    write_model(base, rows, args.out / "base")
    print_scores("base", base, rows, skill)
    sibling = train_sibling(base, rows, args.sibling_steps, args.sibling_lr, args.seed + 1)
    write_model(sibling, rows, args.out / "sibling")
    print_scores("sibling", sibling, rows, skill)


if __name__ == "__main__":
    main()
