"""The tokenizer of a checkpoint."""

from pathlib import Path
from typing import Any

from extend.errors import CheckpointError
from extend.model_config import read_json

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
          "tekken.json")


def load_tokenizer(model: Path | str) -> Any:
    """The tokenizer in a checkpoint directory.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model), local_files_only=True,
                                             trust_remote_code=False)
    except (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError,
            RecursionError) as error:
        raise CheckpointError(f"{model}: its tokenizer cannot be loaded ({error})") from error


def read_vocabulary(model: Path | str) -> dict[str, int] | None:
    """Token -> id of a checkpoint's tokenizer, added tokens included; None when it has none.

    Read from `tokenizer.json` where there is one, which takes no library.

    Raises:
        CheckpointError: a tokenizer that cannot be read.
    """
    directory = Path(model)
    if (directory / "tokenizer.json").is_file():
        return _read_fast(directory / "tokenizer.json")
    if not any((directory / name).is_file() for name in _FILES):
        return None
    return load_tokenizer(model).get_vocab()


def _read_fast(path: Path) -> dict[str, int]:
    """Source: the format of the `tokenizers` library; a Unigram model has a list, in id order."""
    data = read_json(path)
    try:
        vocab = data["model"]["vocab"]
        tokens = dict(vocab) if isinstance(vocab, dict) else {
            token: number for number, (token, _) in enumerate(vocab)}
        tokens.update({entry["content"]: entry["id"] for entry in data.get("added_tokens") or []})
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: holds no vocabulary that can be read; fetch the tokenizer "
                              "again") from None
    return tokens
