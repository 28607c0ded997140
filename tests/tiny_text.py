"""Small tokenizers made on the spot: one token a byte, with a BOS, or with merged digits."""

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

KINDS = ("bytes", "bytes-bos", "merged-digits")
WORDS = ("stone", "river", "lamp", "quiet", "under", "seven", "walk", "green", "door", "wind")


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """`bytes`: a token a byte. `bytes-bos`: a BOS before it. `merged-digits`: BPE in which a space
    and the digits after it share a token, as in the vocabularies of several models."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "merged-digits":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        rng = random.Random(0)
        numbers = [f" {rng.randrange(10_000, 100_000)}" for _ in range(4000)]
        tokenizer.train_from_iterator(numbers, trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, special_tokens=["<bos>", "<eos>"],
            show_progress=False))
    else:
        vocab = {letter: i for i, letter in enumerate(["<bos>", "<eos>", *sorted(alphabet)])}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "bytes-bos":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>",
                                   eos_token="<eos>", model_max_length=512)


def make_text(num_lines: int, seed: int = 0) -> str:
    """Lines of words, some with a number of five digits."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 9))) for _ in range(num_lines)]
    lines[num_lines // 2] += f" {rng.randrange(10_000, 100_000)}"
    return "\n".join(lines) + "\n"


def write_text(path: Path, num_lines: int, seed: int = 0) -> Path:
    path.write_text(make_text(num_lines, seed), encoding="utf-8")
    return path
