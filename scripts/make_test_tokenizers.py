"""Pack real tokenizers for the tests: tests/tokenizers/NAME.json.xz.

    python scripts/make_test_tokenizers.py --litellm DIR --mistral DIR --smollm2 DIR --out tests/tokenizers

DIR are unpacked wheels of litellm 1.110.2 (anthropic, deepseek, cl100k, p50k) and mistral-common
1.13.1 (mistral), and a folder with SmolLM2's tokenizer.json. Needs sentencepiece and protobuf.
"""

import argparse
import base64
import json
import lzma
import shutil
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

# The names that tiktoken keeps its downloads under: sha1 of the address.
_RANKS = {"cl100k": "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
          "p50k": "ec7223a39ce59f226a68acc30dc1af2788490e15"}
_CL100K_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                 r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level BPE; Source: GPT-2's encoder.py."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in kept}
    for number, byte in enumerate(b for b in range(256) if b not in letters):
        letters[byte] = chr(256 + number)
    return letters


def from_ranks(path: Path, name: str) -> Tokenizer:
    """A tokenizer from tiktoken's ranks: each token's merge is the last that makes it."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in (
        line.split() for line in path.read_bytes().splitlines() if line)}
    letters = byte_letters()
    write = lambda token: "".join(letters[byte] for byte in token)  # noqa: E731
    merges = [tuple(map(write, last_pair(ranks, token))) for token in ranks if len(token) > 1]
    taken = set(ranks.values())
    vocab = {write(token): rank for token, rank in ranks.items()}
    vocab["<|endoftext|>"] = next(i for i in range(len(vocab) + 1) if i not in taken)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False) if name == "p50k" else \
        pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_CL100K_WORDS), "isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return tokenizer


def last_pair(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    """The two parts that are left when only merges of lower rank are made."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1),
                   key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks) * 2))
        assert ranks[parts[best] + parts[best + 1]] < ranks[token]
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def from_sentencepiece(model: Path) -> Tokenizer:
    """What transformers makes of a SentencePiece model, with its BOS."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(model, Path(folder) / "tokenizer.model")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>",
            "eos_token": "</s>", "unk_token": "<unk>"}))
        return AutoTokenizer.from_pretrained(folder).backend_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("litellm", "mistral", "smollm2", "out"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    options = parser.parse_args()
    lite = options.litellm / "litellm/litellm_core_utils/tokenizers"
    made = {name: from_ranks(lite / file, name) for name, file in _RANKS.items()}
    made |= {name: Tokenizer.from_file(str(lite / f"{name}_tokenizer.json"))
             for name in ("anthropic", "deepseek")}
    made["smollm2"] = Tokenizer.from_file(str(options.smollm2 / "tokenizer.json"))
    made["mistral"] = from_sentencepiece(
        options.mistral / "mistral_common/data/tokenizer.model.v1")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, tokenizer in sorted(made.items()):
        text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False,
                          separators=(",", ":"))
        packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
        (options.out / f"{name}.json.xz").write_bytes(packed)
        print(f"{options.out / name}.json.xz: {tokenizer.get_vocab_size()} tokens, "
              f"{len(packed)} bytes")


if __name__ == "__main__":
    main()
