"""From whole rows to what one rank computes: shift, then shard.

Shapes: r rows, s local tokens per row. Labels are shifted on the whole row before it is cut, since
the token after the last one of a piece lies on another rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from extend.ring import LAYOUTS, check_length
from extend.train.data import IGNORE, Row


@dataclass(frozen=True)
class Batch:
    """The part of some rows that one rank holds, all [r, s].

    Attributes:
        input_ids: int64.
        labels: int64, the token that follows each input token, or IGNORE.
        answers: bool, where `labels` is part of an answer.
        position_ids: int64, positions in the whole row.
    """

    input_ids: Tensor
    labels: Tensor
    answers: Tensor
    position_ids: Tensor

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.input_ids, self.labels, self.answers, self.position_ids)
        return Batch(*(t.to(device, non_blocking=True) for t in tensors))

    def pin(self) -> "Batch":
        """The same in page-locked memory, from which a GPU copies without waiting."""
        tensors = (self.input_ids, self.labels, self.answers, self.position_ids)
        return Batch(*(t.pin_memory() for t in tensors))

    def counts(self) -> Tensor:
        """int64 [2]: tokens that are predicted, and those of them in answers."""
        return torch.stack(((self.labels != IGNORE).sum(), self.answers.sum()))


def shift(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Labels int64 [length] and answer mask bool [length], each moved one token to the left."""
    labels = np.append(row.labels[1:], IGNORE)
    answers = np.append(row.answers[1:], False) & (labels != IGNORE)
    return labels, answers


def build_batch(rows: Sequence[Row], *, layout: str, rank: int, world: int) -> Batch:
    """What cp rank `rank` of `world` holds of these rows.

    Raises:
        LayoutError: the length does not divide over the ranks.
    """
    length = len(rows[0].input_ids)
    check_length(length, layout, world)
    positions = LAYOUTS[layout].positions(length, rank, world).numpy()
    shifted = [shift(row) for row in rows]
    # Cut by numpy: torch would start a second set of threads in the thread that builds rows.
    ids = np.stack([row.input_ids[positions] for row in rows])
    labels = np.stack([labels[positions] for labels, _ in shifted])
    answers = np.stack([answers[positions] for _, answers in shifted])
    return Batch(*map(torch.from_numpy, (ids, labels, answers, np.stack([positions] * len(rows)))))


def token_weights(batch: Batch, totals: Tensor, answer_weight: float) -> Tensor:
    """Weight of each token's loss, fp32 [r, s].

    Over the whole step, all rows and all ranks, the weights sum to one plus `answer_weight`: the
    mean over predicted tokens plus `answer_weight` times the mean over answer tokens.

    Args:
        totals: int64 [2], `Batch.counts` summed over all ranks and batches of the step.
    """
    share = 1.0 / totals.clamp(min=1).to(torch.float32)
    weights = (batch.labels != IGNORE) * share[0]
    return weights + batch.answers * (answer_weight * share[1])
