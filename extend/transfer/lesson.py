"""Build a lesson from a target as it is: its own answers to prompts, and rows of the long length.

No labels are needed: what must be kept is what the target does by itself under its own RoPE, and
the facts hidden in long rows are made up.
"""

import logging
from collections.abc import Collection, Sequence

from transformers import PreTrainedModel

from extend.errors import DataError
from extend.transfer.batches import make_batches, taught
from extend.transfer.generate import continue_prompts, sampler
from extend.transfer.objective import Head, Lesson
from extend.transfer.rows import Row, answered

log = logging.getLogger(__name__)


def build_lesson(target: PreTrainedModel, prompts: Sequence[Sequence[int]],
                 long_rows: Sequence[Row], *, max_new: int = 64, stop: Collection[int] = (),
                 batch_tokens: int = 8192) -> Lesson:
    """Ask the target, and split everything into a half to learn from and one to judge by.

    Every second prompt and every second long row is held out. The target must carry its own RoPE;
    afterwards the lesson depends on it no more.

    Args:
        prompts: token ids; see `read_prompts` and `sample_texts`.
        long_rows: see `retrieval_rows`; none leaves the long context out of the lesson.
        max_new: most tokens of an answer.
        stop: ids that end an answer, such as the end-of-sequence token.
        batch_tokens: most tokens that are computed together, but for a longer row.

    Raises:
        DataError: fewer than two prompts, one long row, or an answer that would leave the native
            length.
        CompatibilityError: a model that changes its logits after the head.
    """
    _check(target, prompts, long_rows, max_new)
    head = Head.of(target).frozen()
    answers = continue_prompts(target, prompts, max_new=max_new, stop=stop,
                               batch_tokens=2 * batch_tokens)
    rows = [answered(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    device = target.device
    halves = [taught(target, make_batches(half, device, most=batch_tokens))
              for half in (rows[::2], rows[1::2])]
    long = [make_batches(half, device, most=batch_tokens)
            for half in (long_rows[::2], long_rows[1::2])]
    log.info("%d prompts, %d tokens of answers; %d long rows", len(rows),
             sum(map(len, answers)), len(long_rows))
    return Lesson(*halves, *long, head)


def _check(target: PreTrainedModel, prompts: Sequence[Sequence[int]], long_rows: Sequence[Row],
           max_new: int) -> None:
    if len(prompts) < 2:
        raise DataError(f"{len(prompts)} prompts: at least two are needed, one to learn from and "
                        "one to judge by")
    if len(long_rows) == 1:
        raise DataError("1 long row: at least two are needed, one to learn from and one to judge "
                        "by; or give none")
    native = target.config.max_position_embeddings
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) + max_new > native:
            raise DataError(f"prompt {number} has {len(prompt)} tokens and its answer up to "
                            f"{max_new}, together more than the target's native length of "
                            f"{native}; give shorter prompts, or a smaller max_new")


def sample_texts(target: PreTrainedModel, start: Sequence[int], *, count: int, length: int,
                 seed: int, stop: Collection[int] = ()) -> list[list[int]]:
    """Prompts that the target writes itself, drawn from its own distribution.

    Args:
        start: what they begin with: a BOS, or the end-of-sequence token that stands between texts.
        length: tokens that are written after it; a text that ends before is a shorter prompt.
        stop: ids that end a text; they are left out of the prompt.
    """
    written = continue_prompts(target, [start] * count, max_new=length, stop=stop,
                               choose=sampler(seed))
    return [[*start, *(text[:-1] if text[-1] in stop else text)] for text in written]
