"""Whether two models mean the same by the same token id."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError, CompatibilityError, DataError
from extend.evaluate.tasks.task import Prompt
from extend.tokenizer import read_vocabulary


def shared_vocabulary(tokenizer: Any, other: Path | str, where: str) -> int | None:
    """How many ids, from 0 on, stand for the same tokens in a tokenizer and another model's.

    Returns:
        None when neither has a token that the other lacks.

    Raises:
        CheckpointError: the other model has no tokenizer.
        CompatibilityError: they differ in more than tokens added after all shared ones.
    """
    theirs = read_vocabulary(other)
    if theirs is None:
        raise CheckpointError(f"{where}: {other} has no tokenizer to compare with; give a "
                              "checkpoint with one")
    own, theirs = ({index: token for token, index in vocabulary.items()}
                   for vocabulary in (tokenizer.get_vocab(), theirs))
    if own == theirs:
        return None
    shared = max(own.keys() & theirs.keys(), default=-1) + 1
    for index in range(shared):
        if own.get(index) != theirs.get(index):
            raise CompatibilityError(
                f"{where}: id {index} is {own.get(index)!r} for the model but "
                f"{theirs.get(index)!r} for {other}; only models with the same tokens, or with "
                "tokens added at the end, can be compared token by token")
    if not shared:
        raise CompatibilityError(f"{where}: the model and {other} share no token")
    return shared


def check_ids(prompts: Sequence[Prompt], shared: int | None, other: str, where: str) -> None:
    """Refuse text with tokens that only one of two models has.

    Raises:
        DataError: naming the first such id.
    """
    largest = max(max(prompt.ids) for prompt in prompts)
    if shared is not None and largest >= shared:
        raise DataError(f"{where}: the text holds the token {largest}, but {other} shares only ids "
                        f"below {shared}; give text without added tokens")
