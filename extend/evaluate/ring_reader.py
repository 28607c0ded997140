"""Read one row with a model whose row is spread over ranks, part by part, and go on from it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from extend.errors import CompatibilityError
from extend.evaluate.ring_attention import Reading
from extend.evaluate.shards import LAYOUT, Part, Shards
from extend.model_config import depends_on_length
from extend.ring.comm import RingComm
from extend.ring.layouts import length_multiple
from extend.ring.tiles import positions_of


class RingReader:
    """A growing row; all ranks make the same calls in the same order.

    Args:
        model: with `register_ring_prefill()` as its attention; the same on every rank.
        comm: the ranks that share the row.
        chunk: most tokens of one rank in one forward.
        tokens: that will be read, about so many; memory for their keys is taken at once.
        asked: that will be asked on top of them.

    Raises:
        CompatibilityError: several ranks, and a RoPE that changes with the length: each rank would
            take the positions that it sees for all there are.
    """

    def __init__(self, model: PreTrainedModel, comm: RingComm, *, chunk: int, tokens: int = 0,
                 asked: int = 0):
        self.model, self.comm, self.chunk = model, comm, chunk
        self.shards = Shards(comm.rank, comm.world)
        # One rank keeps what is asked, and a part's padding takes room until the next part.
        self.shards.expect(-(-tokens // comm.world) + asked + length_multiple(LAYOUT, 1))
        if comm.world > 1:
            self.refuse_growing_rope(f"spread over {comm.world} processes")

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.shards.length

    def read(self, ids: Sequence[int] | Tensor, *, starts: Sequence[int] = (),
             last: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Read what follows, in equal parts, each spread over the ranks.

        Args:
            ids: token ids [n].
            starts: where the rows begin that lie side by side in `ids` and do not see each other,
                from 0; then it is all that is read, in one part. Empty: `ids` is one row.
            last: nothing is read after it, so that keys of a row in one part need no keeping.

        Yields:
            Of this rank's tokens of a part the positions in the row, int64 [s] on the CPU, and the
            last hidden states [s, hidden_size]; without the padding.
        """
        total, begin = len(ids), self.length
        parts = 1 if starts else -(-total // (self.chunk * self.comm.world))
        if parts > 1 or begin:
            self.refuse_growing_rope(f"read in parts of {self.chunk * self.comm.world} tokens")
        multiple = length_multiple(LAYOUT, self.comm.world)
        size = -(-total // (parts * multiple)) * multiple
        self.shards.expect(-(-total // multiple) * multiple // self.comm.world)
        row = torch.as_tensor(ids, dtype=torch.int64)
        for first in range(0, total, size):
            part = Part(begin + first, min(size, total - first))
            keep = not last or first + size < total
            yield self._read_part(part, row[first:first + size], starts, keep)

    def ask(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Read a few tokens on every rank; last hidden states [n, hidden_size], alike on all.

        One rank, the last, keeps their keys.
        """
        self.refuse_growing_rope("read in parts")
        row = torch.as_tensor(ids, dtype=torch.int64)
        part = Part(self.length, len(row), owner=self.comm.world - 1)
        positions = torch.arange(part.begin, part.end)
        return self._forward(Reading(self.shards, part, self.comm), row, positions)

    def truncate(self, length: int) -> None:
        """Go back to the first `length` tokens.

        Raises:
            CompatibilityError: layers with a sliding window have dropped what that needs.
        """
        self.shards.truncate(length)

    def _read_part(self, part: Part, ids: Tensor, starts: Sequence[int],
                   keep: bool) -> tuple[Tensor, Tensor]:
        world, count = self.comm.world, len(ids)
        padded = part.padded_len(world)
        bounds = (*starts, padded) if len(starts) > 1 else None
        held = positions_of(part.runs(self.comm.rank, world))
        mine = held - part.begin
        row = torch.nn.functional.pad(ids, (0, padded - count))[mine]
        positions = held
        if bounds is not None:  # rows count from 0 each, as they would alone
            begins = torch.tensor(starts)
            positions = mine - begins[torch.bucketize(mine, begins[1:], right=True)]
        hidden = self._forward(Reading(self.shards, part, self.comm, bounds, keep), row, positions)
        real = int((mine < count).sum())  # positions rise, so the padding comes last
        return held[:real], hidden[:real]

    def _forward(self, reading: Reading, ids: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states [s, hidden_size] of this rank's tokens."""
        device = self.model.device
        self.shards.begin(reading.part)
        hidden = self.model.base_model(
            input_ids=ids[None].to(device), position_ids=positions[None].to(device),
            use_cache=False, reading=reading).last_hidden_state[0]
        if reading.keep:
            self.shards.end(reading.part)
        return hidden

    def refuse_growing_rope(self, how: str) -> None:
        """Refuse a RoPE that changes with the length.

        Raises:
            CompatibilityError: it does, and a row that is so read would not be one row.
        """
        rope = getattr(self.model.config, "rope_parameters", None) or {}
        if depends_on_length(rope):
            raise CompatibilityError(f"RoPE of type {rope['rope_type']!r} changes with the length, "
                                     f"so a row cannot be {how}; evaluate this model in one "
                                     "process with a chunk of the whole length")
