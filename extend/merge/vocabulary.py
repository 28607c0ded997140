"""Which row of a delta belongs to which row of a target: the row of the same token.

A fine-tune may have added tokens, dropped some, or turned reserved tokens into chat tokens. So
deltas of the embedding and of the head go from token to token, not from row to row. Rows that hold
no token of the tokenizer (the padding to a round number of rows) go by position.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from extend.delta.sources import Rows, RowsDelta
from extend.errors import CompatibilityError

_SAME_ROW_FRAC = 0.99  # of shared tokens; below, rows were reordered and no position means anything
_RENAMED_FRAC = 0.01  # of the rows: reserved tokens that may have got another string
_RENAMED_LEAST = 8
_SHARED_FRAC = 0.5  # of the target's tokens
_EXAMPLES = 3


@dataclass(frozen=True)
class VocabularyMap:
    """Rows of a target's embedding and the rows of a delta that they get.

    Attributes:
        rows: int64 [target rows]; -1 for a row that the target added.
        source_rows: rows of the delta.
        renamed: (token in the base, token in the target) of rows that kept their place.
        lacking: tokens of the base that the target lacks, renamed ones not counted.
        added: rows of the target that nothing is added to.
    """

    rows: torch.Tensor
    source_rows: int
    renamed: tuple[tuple[str, str], ...] = ()
    lacking: int = 0
    added: int = 0

    @property
    def is_identity(self) -> bool:
        return (len(self.rows) == self.source_rows
                and torch.equal(self.rows, torch.arange(self.source_rows)))

    def text(self) -> str:
        """What is mapped, in one line."""
        line = (f"vocabulary of {self.source_rows} rows mapped to {len(self.rows)} by token: "
                f"{self.added} rows of the target stay untouched, {self.lacking} tokens of the "
                "base are not in the target")
        if self.renamed:
            line += f", {len(self.renamed)} rows were renamed ({_pairs(self.renamed)})"
        return line

    def apply(self, read: RowsDelta) -> RowsDelta:
        """Rows of the target -> their delta; zeros for added rows."""
        return lambda rows: self.gather(read, rows)[0]

    def gather(self, read: Callable[[Rows], torch.Tensor],
               rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Source values of some rows of the target, and which of them are not added rows."""
        wanted = self.rows[rows]
        runs = _runs(wanted)
        known = wanted >= 0
        found = [(start, read(slice(int(wanted[start]), int(wanted[start]) + stop - start)))
                 for start, stop in runs if known[start]]
        example = found[0][1] if found else read(slice(0, 1))
        out = example.new_zeros(len(wanted), *example.shape[1:])
        for start, values in found:
            out[start:start + len(values)] = values
        return out, known.to(out.device)


def _runs(wanted: torch.Tensor) -> list[tuple[int, int]]:
    """Ranges in which each entry is one more than the last, or all are -1."""
    if not len(wanted):
        return []
    step = wanted[1:] - wanted[:-1]
    goes_on = torch.where(wanted[:-1] < 0, step == 0, step == 1)
    cuts = (torch.nonzero(~goes_on).flatten() + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(wanted)], strict=True))


def map_vocabulary(source: Mapping[str, int] | None, source_rows: int,
                   target: Mapping[str, int] | None, target_rows: int, *, label: str,
                   target_label: str) -> VocabularyMap:
    """Map the rows of a target to those of a delta.

    Args:
        source: token -> row, of the model that the delta changes; None where that is not known.
        target: the same for the target.
        label: names the delta in messages.

    Raises:
        CompatibilityError: the sizes differ and tokens are not known, or another tokenizer.
    """
    if source is None or target is None:
        if source_rows == target_rows:
            return VocabularyMap(torch.arange(target_rows), source_rows)
        who = label if source is None else target_label
        raise CompatibilityError(
            f"vocab_size is {source_rows} in the base of {label} but {target_rows} in "
            f"{target_label}, and {who} has no list of tokens by which rows could be mapped; "
            + ("give --base, or extract the adapter again" if source is None
               else "put the target's tokenizer beside its weights"))
    source = {token: row for token, row in source.items() if row < source_rows}
    target = {token: row for token, row in target.items() if row < target_rows}
    shared = target.keys() & source.keys()
    in_place = sum(source[token] == target[token] for token in shared)
    if len(shared) < _SHARED_FRAC * len(target) or (
            source_rows == target_rows and in_place < _SAME_ROW_FRAC * len(shared)):
        raise _other_tokenizer(source, target, label, target_label)
    rows = torch.full((target_rows,), -1, dtype=torch.int64)
    for token in shared:
        rows[target[token]] = source[token]
    renamed = []
    if in_place >= _SAME_ROW_FRAC * len(shared):
        renamed = _place(rows, source, target, source_rows)
    if source_rows == target_rows and len(renamed) > max(_RENAMED_LEAST,
                                                         _RENAMED_FRAC * target_rows):
        raise _other_tokenizer(source, target, label, target_label)
    return VocabularyMap(rows, source_rows, tuple(renamed),
                         len(source.keys() - shared) - len(renamed), int((rows < 0).sum()))


def _place(rows: torch.Tensor, source: Mapping[str, int], target: Mapping[str, int],
           source_rows: int) -> list[tuple[str, str]]:
    """Fill in rows that keep their place: padding in both, and tokens that were renamed."""
    before = {row: token for token, row in source.items()}
    now = {row: token for token, row in target.items()}
    renamed = []
    for row in torch.nonzero(rows[:source_rows] < 0).flatten().tolist():
        if row in before and before[row] not in target and row in now:
            renamed.append((before[row], now[row]))
            rows[row] = row
        elif row not in before and row not in now:
            rows[row] = row
    return renamed


def _other_tokenizer(source: Mapping[str, int], target: Mapping[str, int], label: str,
                     target_label: str) -> CompatibilityError:
    now = {row: token for token, row in target.items()}
    differing = [(token, now[row]) for token, row in source.items()
                 if row in now and now[row] != token]
    return CompatibilityError(
        f"the base of {label} and {target_label} have different tokenizers: {len(differing)} of "
        f"{len(source)} rows hold another token ({_pairs(differing)}); merge into a fine-tune of "
        "the same base, or leave embedding deltas out with --no-sidecar")


def _pairs(pairs: "list[tuple[str, str]] | tuple[tuple[str, str], ...]") -> str:
    shown = ", ".join(f"{before!r} is {after!r}" for before, after in pairs[:_EXAMPLES])
    return shown + (", ..." if len(pairs) > _EXAMPLES else "")
