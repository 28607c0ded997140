"""The tokenizer of a GGUF model, as files that transformers 4 and 5 both read.

Built here, because transformers converts it differently from release to release, and does not know
how every vocabulary splits its text.

Source: llama.cpp, src/llama-vocab.cpp (how text is split, which token is added in front).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from extend.errors import CompatibilityError
from extend.gguf.header import Header
from extend.output import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _CONTROL, _USER, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # token types
_SPACE = "▁"
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_WORDS}|\p{{N}}{_REST}"
_TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
           r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
           r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLITS: dict[str, str | None] = {
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "tekken": _TEKKEN,
    "smollm": None, "gpt-2": None, "default": None}
"""How byte-level BPE splits text first: an expression, or that of GPT-2."""
_SINGLE_DIGITS = {"smollm"}
_BOS_UNLESS_TOLD = {"llama-bpe", "llama3", "llama-v3", "tekken"}


def write_tokenizer(header: Header, directory: Path, max_len: int) -> None:
    """Write tokenizer.json, its config and the chat template.

    Args:
        max_len: tokens, `model_max_length`.

    Raises:
        CompatibilityError: a tokenizer of another kind.
    """
    tokens = header.get("tokenizer.ggml.tokens")
    kind = header.get("tokenizer.ggml.model")
    if not tokens or kind not in BUILDERS:
        raise CompatibilityError(
            f"{header.path}: its tokenizer is {kind!r}; built are {', '.join(BUILDERS)}; give the "
            "tokenizer of the original model (--tokenizer)")
    types = header.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    try:
        tokenizer = BUILDERS[kind](header, tokens, types)
    except CompatibilityError:
        raise
    except Exception as error:  # the library has no class of its own for what does not fit
        raise CompatibilityError(f"{header.path}: its tokenizer cannot be built ({error}); give "
                                 "that of the original model (--tokenizer)") from None
    special = {f"{short}_token": tokens[token] for short, name in _SPECIAL.items()
               if (token := header.get(f"tokenizer.ggml.{name}_token_id")) is not None}
    if _adds_bos(header, kind):
        _put_in_front(tokenizer, special["bos_token"])
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {
        "clean_up_tokenization_spaces": False, "model_max_length": max_len,
        "tokenizer_class": "PreTrainedTokenizerFast", **special})
    template = header.get("tokenizer.chat_template")
    if template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _adds_bos(header: Header, kind: str) -> bool:
    told = header.get("tokenizer.ggml.add_bos_token")
    if told is None:
        told = kind == "llama" or header.get("tokenizer.ggml.pre") in _BOS_UNLESS_TOLD
    return bool(told) and header.get("tokenizer.ggml.bos_token_id") is not None


def _put_in_front(tokenizer: "Tokenizer", token: str) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", f"{token}:1", "$B:1"],
        special_tokens=[(token, tokenizer.token_to_id(token))])


def _byte_level(header: Header, tokens: list[str], types: list[int]) -> "Tokenizer":
    """BPE over bytes, as of GPT-2, Llama 3 and Qwen."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = header.get("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise CompatibilityError(f"{header.path}: tokenizer.ggml.pre is {name!r}; known are "
                                 f"{', '.join(SPLITS)}; give the tokenizer of the original model "
                                 "(--tokenizer)")
    merges = [tuple(merge.split(" ")) for merge in header.need("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(_vocabulary(header, tokens, types), merges,
                                     ignore_merges=SPLITS[name] is _LLAMA3))
    split = SPLITS[name]
    first = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    if name in _SINGLE_DIGITS:
        first = [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)])
    tokenizer.decoder = decoders.ByteLevel()
    _add_whole(tokenizer, tokens, types, normalized=False)
    return tokenizer


def _sentencepiece(header: Header, tokens: list[str], types: list[int]) -> "Tokenizer":
    """BPE over characters with bytes to fall back on, as of Llama 2 and Gemma."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    # Gemma's files spell tokens of spaces as spaces, which the text has no more when it is split.
    tokens = [token.replace(" ", _SPACE) if kind == _USER else token
              for token, kind in zip(tokens, types, strict=True)]
    vocabulary = _vocabulary(header, tokens, types)
    unknown = header.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(models.BPE(
        vocabulary, _merges_of(tokens, types, header.need("tokenizer.ggml.scores")),
        unk_token=None if unknown is None else tokens[unknown], fuse_unk=True,
        byte_fallback=_BYTE in types))
    prefix = bool(header.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
         *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    _add_whole(tokenizer, tokens, types, normalized=True)
    return tokenizer


def _vocabulary(header: Header, tokens: list[str], types: list[int]) -> dict[str, int]:
    """Token -> id, without the ids that no text leads to."""
    kept = [(token, number) for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind != _UNUSED]
    found = dict(kept)
    if len(found) != len(kept):
        raise CompatibilityError(f"{header.path}: {len(kept) - len(found)} tokens are there twice; "
                                 "give the tokenizer of the original model (--tokenizer)")
    return found


def _merges_of(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that a vocabulary with scores implies: the best piece first.

    Source: sentencepiece, src/bpe_model.cc: any two neighbours whose concatenation is a piece.
    """
    normal = [number for number, kind in enumerate(types) if kind == _NORMAL]
    vocabulary = {tokens[number]: number for number in normal}
    merges: list[tuple[str, str]] = []
    for number in sorted(normal, key=lambda number: -scores[number]):
        token = tokens[number]
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += sorted((pair for pair in parts if vocabulary.keys() >= set(pair)),
                         key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _add_whole(tokenizer: "Tokenizer", tokens: list[str], types: list[int], *,
               normalized: bool) -> None:
    """Tokens that are never cut into pieces; of these, control tokens are special.

    Args:
        normalized: whether plain ones are looked for in the normalized text.
    """
    from tokenizers import AddedToken

    marked = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token, kind in marked if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=normalized)
                          for token, kind in marked if kind == _USER])


BUILDERS: dict[str, Any] = {"gpt2": _byte_level, "llama": _sentencepiece}
"""`tokenizer.ggml.model` -> what builds such a tokenizer."""
