"""From options and directories to the lesson that both stages learn from."""

import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from extend.errors import CompatibilityError, DataError, RecipeError
from extend.haystack import prefix_ids
from extend.transfer.lesson import build_lesson, sample_texts
from extend.transfer.objective import Lesson
from extend.transfer.rows import Row, read_prompts, retrieval_rows
from extend.transfer_options import LessonOptions

log = logging.getLogger(__name__)
_LONGEST_ROW = 32768  # unless a length is given: longer rows take minutes, and say little more
_SAMPLE_LEN = 64


def make_lesson(target: PreTrainedModel, tokenizer: Any, options: LessonOptions,
                context: int) -> Lesson:
    """The lesson of a target that carries its own RoPE.

    Args:
        context: tokens, the long context that the merged model is made for.

    Raises:
        DataError: prompts or text that are missing, malformed, too short or too long.
        RecipeError: rows longer than the context.
    """
    stop = stop_ids(target, tokenizer)
    long_rows = make_long_rows(tokenizer, options, context)
    prompts = _choose_prompts(tokenizer, options)
    if options.sample:
        start = prefix_ids(tokenizer) or _end_of_text(tokenizer)
        length = min(_SAMPLE_LEN, target.config.max_position_embeddings - options.max_new
                     - len(start))
        if length < 1:
            raise DataError(f"max_new is {options.max_new}, which leaves no room for texts of the "
                            f"target's own in its {target.config.max_position_embeddings} tokens; "
                            "give less")
        prompts += sample_texts(target, start, count=options.sample, length=length,
                                seed=options.seed, stop=stop)
    return build_lesson(target, prompts, long_rows, max_new=options.max_new, stop=stop)


def _choose_prompts(tokenizer: Any, options: LessonOptions) -> list[list[int]]:
    if options.prompts is None:
        return []
    prompts = read_prompts(tokenizer, options.prompts)
    # A prompt given twice could be learnt from and judged by.
    distinct = list({tuple(prompt): prompt for prompt in prompts}.values())
    chosen = random.Random(f"{options.seed}/prompts").sample(
        distinct, min(len(distinct), options.max_prompts))
    log.info("%d of %d distinct prompts of %s", len(chosen), len(distinct), options.prompts)
    return chosen


def make_long_rows(tokenizer: Any, options: LessonOptions, context: int) -> list[Row]:
    """The rows with hidden facts; see `make_lesson`."""
    if not options.rows:
        return []
    length = options.length or min(context, _LONGEST_ROW)
    if length > context:
        raise RecipeError(f"length is {length}, but the long context has {context} tokens; give at "
                          "most that")
    return retrieval_rows(tokenizer, length=length, count=options.rows, seed=options.seed,
                          text=options.text, facts=options.facts)


def stop_ids(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """What ends a text: the tokenizer's end-of-sequence token, and those of generation."""
    generation = getattr(model.generation_config, "eos_token_id", None)
    more = generation if isinstance(generation, list) else [generation]
    return {i for i in (tokenizer.eos_token_id, *more) if i is not None}


def _end_of_text(tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise DataError("the target's tokenizer has neither a begin- nor an end-of-sequence token "
                        "to begin a text with; give prompts")
    return [tokenizer.eos_token_id]


def check_tokens(mine: Mapping[str, int], other: Mapping[str, int], here: Path | str,
                 there: Path | str) -> None:
    """Raise CompatibilityError unless two vocabularies number the same tokens alike."""
    for token in sorted({*mine, *other}):
        if mine.get(token) != other.get(token):
            raise CompatibilityError(
                f"token {token!r} is {_known(mine, token)} in {here} but {_known(other, token)} in "
                f"{there}; models of one tokenizer are needed")


def _known(vocabulary: Mapping[str, int], token: str) -> str:
    return f"number {vocabulary[token]}" if token in vocabulary else "unknown"


def describe_inputs(options: LessonOptions, roles: Sequence[str]) -> dict[str, str]:
    """Role -> path of the inputs that were given, for the manifest."""
    paths = {role: getattr(options, role) for role in (*roles, "prompts", "text")}
    return {role: path for role, path in paths.items() if path is not None}
