"""The tokenizer of a checkpoint."""

from pathlib import Path
from typing import Any

from extend.errors import CheckpointError


def load_tokenizer(model: Path | str) -> Any:
    """The tokenizer in a checkpoint directory.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{model}: its tokenizer cannot be loaded ({error})") from error
