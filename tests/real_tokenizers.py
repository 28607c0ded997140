"""Real tokenizers of different kinds, and more kinds trained on the spot; see tokenizers/."""

import functools
import lzma
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import decoders as decode
from transformers import PreTrainedTokenizerFast

from tests.tiny_text import make_text

_FOLDER = Path(__file__).parent / "tokenizers"
_CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
           "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# The way each family writes a turn, in short.
TEMPLATES = {
    "smollm2": "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n" + _CHATML,
    "deepseek": ("<｜begin▁of▁sentence｜>{% for m in messages %}<｜User｜>{{ m.content }}"
                 "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"),
    "anthropic": ("{% for m in messages %}\n\nHuman: {{ m.content }}{% endfor %}"
                  "{% if add_generation_prompt %}\n\nAssistant:{% endif %}"),
    "cl100k": _CHATML,
    "p50k": "User: {{ messages[0].content }}\nAnswer:\n",
    "mistral": "<s>[INST] {{ messages[0].content | trim }} [/INST]",
    "unigram": "<s>{{ messages[0].content }}\n>>> ",
    "words": "[CLS] user : {{ messages[0].content }} assistant :",
}
_SPECIAL = {
    "smollm2": ("<|im_start|>", "<|im_end|>"), "anthropic": ("<EOT>", "<EOT>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "cl100k": (None, "<|endoftext|>"), "p50k": (None, "<|endoftext|>"),
    "mistral": ("<s>", "</s>"), "unigram": ("<s>", "</s>"), "words": ("[CLS]", "[SEP]")}
REAL = ("smollm2", "deepseek", "anthropic", "cl100k", "p50k", "mistral")
TRAINED = ("unigram", "words")


@functools.cache
def load(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template; shared, so do not change it."""
    begin, end = _SPECIAL[name]
    if name in REAL:
        core = Tokenizer.from_str(lzma.decompress(
            (_FOLDER / f"{name}.json.xz").read_bytes()).decode())
    else:
        core = {"unigram": _unigram, "words": _words}[name]()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=begin, eos_token=end)
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def _corpus() -> list[str]:
    lines = make_text(300).splitlines() + [f"The pass key is {n}. Find it." for n in range(99)]
    return [f"{line}\n" for line in lines]


def _unigram() -> Tokenizer:
    """As SentencePiece's: probabilities of pieces, spaces in them, a space before every text."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")])
    core.decoder = decode.Metaspace(prepend_scheme="first")
    letters = [chr(i) for i in range(32, 127)] + ["\n", "▁"]
    core.train_from_iterator(_corpus(), trainers.UnigramTrainer(
        vocab_size=400, initial_alphabet=letters, special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>", show_progress=False))
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return core


def _words() -> Tokenizer:
    """As BERT's: words and their ends, no white space, a BOS."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decode.WordPiece()
    letters = [chr(i) for i in range(33, 127)]
    core.train_from_iterator(_corpus(), trainers.WordPieceTrainer(
        vocab_size=500, initial_alphabet=letters, show_progress=False,
        special_tokens=["[UNK]", "[CLS]", "[SEP]"]))
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", core.token_to_id("[CLS]"))])
    return core
