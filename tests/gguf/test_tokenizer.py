"""Tokenizers of GGUF files against those that the files were made from."""

import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, pre_tokenizers

from extend.gguf.tokenizer import SPLITS, write_tokenizer

REAL = Path(__file__).parents[1] / "tokenizers"
TEXT = ("Hello  World, it's 2024:\n\n\tx = 10**6  # caf\u00e9 na\u00efve\n"
        "   \u65e5\u672c\u8a9e \u4e2d\u6587 \U0001f642 don't WE'LL 123 a1b2 <|im_end|> </s>\r\n x ")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


class Fields:
    """What `write_tokenizer` asks of a file."""

    path = Path("m.gguf")

    def __init__(self, **fields: Any):
        self._fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}

    def get(self, key: str, default: Any = None) -> Any:
        return self._fields.get(key, default)

    need = get


def written(fields: Fields, out: Path) -> Tokenizer:
    write_tokenizer(fields, out, 64)
    return Tokenizer.from_file(str(out / "tokenizer.json"))


def read(name: str) -> dict:
    return json.loads(lzma.decompress((REAL / f"{name}.json.xz").read_bytes()))


def test_byte_level_of_a_real_model(tmp_path):
    """SmolLM2's: every text gives the ids that its own tokenizer gives."""
    data = read("smollm2")
    original = Tokenizer.from_str(json.dumps(data))
    vocab = sorted(data["model"]["vocab"].items(), key=lambda item: item[1])
    control = {entry["id"] for entry in data["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    fields = Fields(model="gpt2", pre="smollm", tokens=[token for token, _ in vocab],
                    merges=merges, bos_token_id=1, eos_token_id=2, add_bos_token=False,
                    token_type=[3 if number in control else 1 for _, number in vocab])
    ours = written(fields, tmp_path)
    for text in (TEXT, Path(__file__).read_text()):
        assert ours.encode(text).ids == original.encode(text).ids
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["model_max_length"]) == (
        "<|im_start|>", "<|im_end|>", 64)


def test_a_split_is_that_of_a_real_model():
    """Llama 3's own tokenizer.json, and Qwen 2's, which takes digits one by one."""
    def split(expression: str) -> list[str]:
        cut = pre_tokenizers.Split(Regex(expression), "isolated")
        return [part for part, _ in cut.pre_tokenize_str(TEXT)]

    assert SPLITS["llama-bpe"] == LLAMA3
    ours = split(LLAMA3)
    assert split(SPLITS["qwen2"]) == [
        piece for part in ours for piece in (part if part.isdigit() else [part])]


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    """BPE with bytes to fall back on, trained on this folder."""
    model = io.BytesIO()
    lines = [line for path in sorted(Path(__file__).parent.glob("*.py"))
             for line in path.read_text().splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=600,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, user_defined_symbols=["\u2581\u2581", "<tool>"],
        num_threads=1, minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_sentencepiece_itself_gives_the_same_ids(pieces, tmp_path):
    size = pieces.get_piece_size()
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else
             6 if pieces.is_byte(i) else 1 for i in range(size)]
    tokens = [pieces.id_to_piece(i) for i in range(size)]
    for token in ("\u2581\u2581", "<tool>"):
        kinds[tokens.index(token)] = 4
    tokens[tokens.index("\u2581\u2581")] = "  "  # as Gemma's files spell it
    ours = written(Fields(
        model="llama", tokens=tokens, token_type=kinds, add_space_prefix=False,
        scores=[pieces.get_score(i) for i in range(size)], unknown_token_id=pieces.unk_id(),
        bos_token_id=pieces.bos_id(), eos_token_id=pieces.eos_id()), tmp_path)
    source = Path(__file__).read_text()
    for text in (TEXT, source, "a<tool>b     c", " ", "x"):
        for control in ("<s>", "</s>", "<unk>"):  # sentencepiece takes them for text
            text = text.replace(control, "")
        expected = pieces.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == expected
        assert ours.encode(text).ids == [pieces.bos_id(), *expected]
        assert ours.decode(expected) == text
