"""A real tokenizer, and small ones that cut text in the ways that real ones do."""

import json
import lzma
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from extend.evaluate.tasks.ruler.words import read_words

DATA = Path(__file__).parents[2] / "data"
_TOKENIZERS = DATA.with_name("tokenizers")

# How the tokenizers of Llama 3 and GPT-4 cut: a sign goes with the word after it, line breaks with
# the signs before them, digits in threes.
_THREES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
           r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@cache
def smollm2() -> PreTrainedTokenizerFast:
    """The tokenizer that the golden samples were made with."""
    raw = lzma.decompress((_TOKENIZERS / "smollm2.json.xz").read_bytes())
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(raw.decode()),
                                   bos_token="<|im_start|>", eos_token="<|im_end|>")


def golden(task: str, length: int) -> list[dict]:
    """NVIDIA's samples of a task at a length."""
    rows = [json.loads(line) for line in (DATA / "ruler6.jsonl").read_text().splitlines()]
    return [row for row in rows if (row["task"], row["max_seq_length"]) == (task, length)]


def _texts() -> list[str]:
    lines = ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back "
             "again.\nOne of the special magic numbers for\n\nVAR ABC = VAR XYZ \nQuestion: Find "
             "all variables that are assigned the value 1234567 in the text above.\n"] * 50
    return lines + [f" {first}-{second} is: {number}.\n" for first, second, number in zip(
        read_words("adjectives"), read_words("nouns")[::7], range(1_000_000, 9_000_000, 7_919))]


@cache
def small(kind: str) -> PreTrainedTokenizerFast:
    """`threes`: as Llama 3; `spaces`: as SentencePiece, with a space before every text and nothing
    cut; `lines`: joins words, so that nothing but the whole text is safe."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    if kind == "spaces":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        words = Regex(r"▁?[A-Za-z]+|▁?[0-9]|▁?[^▁\w\n]|\n|▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
        alphabet = [chr(i) for i in range(33, 127)] + ["\n", "▁", "é"]
    else:
        cut = pre_tokenizers.Split(Regex(_THREES if kind == "threes" else r"[^.]+\.?"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_texts(), trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=["<bos>", "<eos>"],
        show_progress=False))
    if kind == "spaces":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("$^"), "isolated")  # only to train
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>",
                                   eos_token="<eos>")
