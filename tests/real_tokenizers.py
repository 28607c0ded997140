"""Real tokenizers of different kinds, and more kinds made on the spot; see tokenizers/."""

import functools
import lzma
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers import decoders as decode
from transformers import PreTrainedTokenizerFast

from tests.tiny_text import WORDS

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
MADE = ("unigram", "words")


@functools.cache
def load(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template; shared, so do not change it."""
    begin, end = _SPECIAL[name]
    if name in MADE:
        core = {"unigram": _unigram, "words": _words}[name]()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=begin, eos_token=end)
    else:  # from a file: an object would be copied, which takes longer than reading it
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            file.write(lzma.decompress((_FOLDER / f"{name}.json.xz").read_bytes()))
            file.flush()
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=file.name, bos_token=begin,
                                                eos_token=end)
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


_WORDS = ("The", "pass", "key", "is", "for", "What", "grass", "sky", "sun", "green", "There", "and",
          "back", "again", "number", "Remember", "it", *WORDS)
_LETTERS = [chr(i) for i in range(33, 127)]


def _unigram() -> Tokenizer:
    """As SentencePiece's: pieces with probabilities, some over two words, a space before a text."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -4.0), ("\n", -4.0),
              *((letter, -6.0) for letter in _LETTERS), *((f"▁{word}", -5.0) for word in _WORDS),
              ("▁pass▁key", -6.0), (".▁", -7.0)]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "isolated"),
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False)])
    core.decoder = decode.Metaspace(prepend_scheme="first")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return core


def _words(inner: str = "".join(_LETTERS)) -> Tokenizer:
    """As BERT's: words and their ends, no white space, a BOS.

    Args:
        inner: letters that a word may go on with.
    """
    pieces = ["[UNK]", "[CLS]", "[SEP]", *_LETTERS, *(f"##{letter}" for letter in inner), *_WORDS]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decode.WordPiece()
    core.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", core.token_to_id("[CLS]"))])
    return core


def without_digits() -> PreTrainedTokenizerFast:
    """Words that cannot go on with a digit: it cannot write a number."""
    return PreTrainedTokenizerFast(tokenizer_object=_words("abcdefghijklmnopqrstuvwxyz"),
                                   bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]")
