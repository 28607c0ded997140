"""From whole rows to what one rank computes: shift, lay side by side, shard.

Shapes: r rows, s local tokens per row. Labels are shifted on the whole row before it is cut, since
the token after the last one of a piece lies on another rank.

A token's position is its place in the row it was cut as, wherever its document begins. Attention
with rotary embeddings depends on differences of positions only, so within a document it makes no
difference. It does to RoPE types that choose their frequencies by the largest position of a call
(dynamic, longrope): these then see the length of the row, the same in every step and the one that
the phase is for, and not that of whichever document is the longest. Rows that are read with the
model's own RoPE count from each document's beginning: they are to be what the model was made for.
Where positions skip (`position_span`), attention's mask and windows still count tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from extend.ring import LAYOUTS, check_length
from extend.train.data import IGNORE, PLAIN, Row, RowKind, Windows

_PIECE = 1024  # tokens that are read at once where nothing depends on what is read


class Taught(NamedTuple):
    """The same part of the same rows, as the teacher reads them, both [r, s].

    Attributes:
        input_ids: int64.
        position_ids: int64, in the document or window.
        cu_seqlens: as those of `Batch`, of the documents or windows.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: tuple[int, ...] | None


@dataclass(frozen=True)
class Batch:
    """The part of some rows that one rank holds, all [r, s].

    Attributes:
        input_ids: int64.
        labels: int64, the token that follows each input token, or IGNORE.
        answers: bool, where `labels` is part of an answer.
        position_ids: int64, positions in the whole row, before rows were laid side by side; under
            `kind.native_rope` in the document.
        cu_seqlens: (0, ..., length), where the documents of the whole row begin that do not see one
            another; r is 1 then. None: a document a row.
        kind: that of all rows.
        taught: what the teacher reads; None where no group distills what it computes meanwhile.
            Where one does, all gather the teacher's weights.
    """

    input_ids: Tensor
    labels: Tensor
    answers: Tensor
    position_ids: Tensor
    cu_seqlens: tuple[int, ...] | None = None
    kind: RowKind = PLAIN
    taught: Taught | None = None

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """The same in page-locked memory, from which a GPU copies without waiting."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        taught = self.taught and self.taught._replace(
            input_ids=change(self.taught.input_ids), position_ids=change(self.taught.position_ids))
        return replace(self, taught=taught, **{
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)})

    def counts(self) -> Tensor:
        """int64 [3]: tokens that are predicted, those of them in answers, and those distilled."""
        predicted = (self.labels != IGNORE).sum()
        return torch.stack((predicted, self.answers.sum(), predicted * self.kind.distill))

    def documents(self, world: int) -> list[int]:
        """Tokens of each document of the whole rows, which `world` ranks share."""
        if self.cu_seqlens is None:
            rows, local_len = self.input_ids.shape
            return [local_len * world] * rows
        return np.diff(self.cu_seqlens).tolist()


def shift(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Labels int64 [length] and answer mask bool [length], each moved one token to the left."""
    labels = np.append(row.labels[1:], IGNORE)
    answers = np.append(row.answers[1:], False) & (labels != IGNORE)
    return labels, answers


def build_batch(rows: Sequence[Row], *, layout: str, rank: int, world: int,
                document_mask: bool = False, reads_teacher: bool = False) -> Batch:
    """What cp rank `rank` of `world` holds of these rows.

    With `document_mask`, rows of which one has several documents are laid side by side as one row,
    which the ranks then share; so short rows are computed together however many documents they
    hold. Without, and where each row is one document, they stay rows. All rows are of one kind.

    Args:
        reads_teacher: some group distills what it computes meanwhile.

    Raises:
        LayoutError: the length does not divide over the ranks.
    """
    length = len(rows[0].input_ids)
    check_length(length, layout, world)
    shifted = [shift(row) for row in rows]
    columns = [np.stack([row.input_ids for row in rows]),
               np.stack([labels for labels, _ in shifted]),
               np.stack([answers for _, answers in shifted]),
               np.stack([number_tokens(row) for row in rows])]
    windows = [read_by_teacher(row, alone=len(rows) == 1) for row in rows if reads_teacher]
    if reads_teacher:
        columns += [np.stack([part.input_ids for part in windows]),
                    np.stack([number_in_documents(part) for part in windows])]
    bounds = taught_bounds = None
    if document_mask and any(len(part.cu_seqlens) > 2 for part in (*rows, *windows)):
        columns = [column.reshape(1, -1) for column in columns]
        if len(rows) > 1 or len(rows[0].cu_seqlens) > 2:
            bounds = join_boundaries([row.cu_seqlens for row in rows])
        if reads_teacher:
            taught_bounds = join_boundaries([part.cu_seqlens for part in windows])
    held = LAYOUTS[layout].positions(columns[0].shape[1], rank, world).numpy()
    # Cut by numpy: torch would start a second set of threads in the thread that builds rows.
    parts = [torch.from_numpy(np.ascontiguousarray(column[:, held])) for column in columns]
    taught = Taught(*parts[4:], taught_bounds) if reads_teacher else None
    return Batch(*parts[:4], cu_seqlens=bounds, kind=rows[0].kind, taught=taught)


def read_by_teacher(row: Row, alone: bool) -> Windows:
    """The documents or windows that the teacher reads of a row.

    Args:
        alone: no other rows beside it. What is not distilled the teacher reads for the gathers that
            it shares with other groups, so then in short pieces, which cost no attention.
    """
    if row.windows is not None:
        return row.windows
    length = len(row.input_ids)
    if alone and not row.kind.distill:
        return Windows(row.input_ids, np.append(np.arange(0, length, _PIECE), length))
    return Windows(row.input_ids, row.cu_seqlens)


def number_tokens(row: Row) -> np.ndarray:
    """Position of each token, int64 [length]: in its row, or in its document."""
    if row.positions is not None:
        return row.positions
    return number_in_documents(row) if row.kind.native_rope else np.arange(len(row.input_ids))


def number_in_documents(row: Row | Windows) -> np.ndarray:
    """How far each token is from the beginning of its document or window, int64 [length]."""
    places = np.arange(len(row.input_ids))
    return places - np.repeat(row.cu_seqlens[:-1], np.diff(row.cu_seqlens))


def join_boundaries(bounds: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Where documents begin in rows of one length laid side by side, and where the last one ends.

    Args:
        bounds: of each row, from 0 to its length.
    """
    length = int(bounds[0][-1])
    starts = [row[:-1] + i * length for i, row in enumerate(bounds)]
    return (*np.concatenate(starts).tolist(), length * len(bounds))


def token_weights(batch: Batch, totals: Tensor, answer_weight: float) -> Tensor:
    """Weight of each token's loss, fp32 [r, s].

    Over the whole step, all rows and all ranks, the weights sum to one plus `answer_weight`: the
    mean over predicted tokens plus `answer_weight` times the mean over answer tokens.

    Args:
        totals: `Batch.counts` summed over all ranks and batches of the step.
    """
    share = 1.0 / totals.clamp(min=1).to(torch.float32)
    weights = (batch.labels != IGNORE) * share[0]
    return weights + batch.answers * (answer_weight * share[1])
