"""Causal attention of one row whose keys are spread over ranks, for prefill and for what follows.

    spread part      each rank has the queries of its own tokens. Keys and values travel, one rank's
                     at a time: those of this part and of all parts before it, as far as they are
                     seen. While one rank's are on their way another's are computed on.
    part of an owner every rank has the same few queries. They attend to the rank's own keys, and
                     the partial results are joined through their log-sum-exp. Nothing else travels.

Source: ring attention, arXiv:2310.01889; passing keys for long parts and results for short ones as
in Context Parallelism for Scalable Million-Token Inference, arXiv:2411.01783.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface

from extend.errors import CompatibilityError
from extend.evaluate.attention import refuse_arguments, refuse_layer
from extend.evaluate.shards import LAYOUT, Part, Shards
from extend.ring.agreement import agree_on_kernel, sum_over
from extend.ring.blocks import block_shape, fill_block, open_block
from extend.ring.call import Call, shift_keys
from extend.ring.comm import RingComm, Transfer, Window
from extend.ring.kernels import KERNELS, Kernel, choose_kernel
from extend.ring.mask import Mask, make_mask
from extend.ring.partial import AttentionSum
from extend.ring.tiles import Run, Tile, fit_tiles, plan_tiles, rows_needed

ATTENTION_NAME = "extend_ring_prefill"


@dataclass
class Reading:
    """One forward of a part of a row, as a model hands it down to its attention.

    Attributes:
        shards: where the keys of the row lie; those of the part are added.
        part: what is read.
        comm: the ranks that share the row.
        bounds: (0, ..., padded length), where rows begin that lie side by side in the part and do
            not see each other; only in the first part. None: one row.
        keep: whether anything is read after this part.
    """

    shards: Shards
    part: Part
    comm: RingComm
    bounds: tuple[int, ...] | None = None
    keep: bool = True
    _masks: dict[int | None, Mask] = field(default_factory=dict)
    _travels: dict[int | None, "Travel"] = field(default_factory=dict)

    def mask(self, window: int | None) -> Mask:
        """What queries see, by position in the row."""
        if window not in self._masks:
            total = self.part.begin + self.part.padded_len(self.comm.world)
            self._masks[window] = make_mask(True, window, self.bounds, total)
        return self._masks[window]

    def keys(self, rank: int, window: int | None) -> tuple[Run, ...]:
        """The positions of the keys that `rank` has, those of this part included."""
        return self.shards.held(rank, window) + self.part.runs(rank, self.comm.world)

    def travel(self, window: int | None, kernel: Kernel) -> "Travel":
        """How keys travel in the layers with this window."""
        if window not in self._travels:
            self._travels[window] = Travel(self, window, kernel)
        return self._travels[window]


def register_ring_prefill() -> str:
    """Make it known to transformers and return its name; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, ring_prefill_attention)
    return ATTENTION_NAME


def ring_prefill_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                           attention_mask: Tensor | None, *, scaling: float | None = None,
                           sliding_window: int | None = None, reading: Reading | None = None,
                           **kwargs: Any) -> tuple[Tensor, None]:
    """Attention as transformers calls it, of the local tokens of a part.

    Args:
        query: [1, h, n, d], rotated with their positions in the row.
        key, value: [1, h_kv, n, d].
        sliding_window: tokens that a query sees, its own included; None is all up to its own.

    Returns:
        out [1, n, h, d], and None for the weights.

    Raises:
        CompatibilityError: the model asks for what is not computed here, or does not hand
            `reading` down.
    """
    index = getattr(module, "layer_idx", None)
    if reading is None or index is None:
        missing = "the keyword 'reading'" if reading is None else "the number of its layer"
        raise CompatibilityError(f"{type(module).__name__} is not told {missing}, so its row "
                                 "cannot be spread over ranks; evaluate it without "
                                 "context_parallel")
    refuse_arguments(module, attention_mask, kwargs)
    refuse_layer(module, sliding_window, reading.part.end)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    k, v = reading.shards.put(reading.part, index, key, value, window=sliding_window,
                              keep=reading.keep)
    attend = _attend_spread if reading.part.owner is None else _attend_owned
    out = attend(reading, query, k, v, sliding_window, scale)
    return out.transpose(1, 2).contiguous(), None


def _attend_spread(reading: Reading, q: Tensor, k: Tensor, v: Tensor, window: int | None,
                   scale: float) -> Tensor:
    """out [1, h, n, d] of this rank's queries to the keys of all ranks; k and v are its own."""
    comm, mask = reading.comm, reading.mask(window)
    kernel = choose_kernel("auto", q, k, mask=mask, group=comm.ranks,
                           agree=lambda times: sum_over(comm, times))
    agree_on_kernel(comm, kernel="evaluation", takes_bands=kernel.bands,
                    takes_documents=kernel.packed)
    travel = reading.travel(window, kernel)
    total = AttentionSum(q, _call(reading, mask, kernel, scale), travel.tiles)
    for tiles, keys, values in travel.steps(k, v):
        total.add(tiles, keys, values)
        del keys, values  # or three ranks' keys are held while the next but one's arrive
    return total.result()[0]


class Travel:
    """The way of every rank's keys to the queries that see them; the same for layers alike."""

    def __init__(self, reading: Reading, window: int | None, kernel: Kernel):
        comm = self._comm = reading.comm
        ranks, mask = range(comm.world), reading.mask(window)
        queries = [reading.part.runs(rank, comm.world) for rank in ranks]
        keys = [reading.keys(rank, window) for rank in ranks]
        tiles = [[_plan(ours, theirs, mask, kernel.bands, kernel.packed) for theirs in keys]
                 for ours in queries]
        self.tiles = tiles[comm.rank]  # by source
        self._needed = [[rows_needed(some) for some in row] for row in tiles]  # [rank][source]
        self._offered = [rows_needed([tile for rank in ranks if rank != source
                                      for tile in tiles[rank][source]]) for source in ranks]

    def steps(self, k: Tensor, v: Tensor) -> Iterator[tuple[tuple[Tile, ...], Tensor, Tensor]]:
        """(tiles, k, v) of each rank's keys in turn, this one's first; valid for one step."""
        rank, world = self._comm.rank, self._comm.world
        window = self._publish(k, v) if world > 1 else None
        ahead = self._fetch(window, 1, k) if world > 1 else None
        yield self.tiles[rank], k, v
        for step in range(1, world):
            transfer, block = ahead
            ahead = self._fetch(window, step + 1, k) if step + 1 < world else None
            transfer.wait()
            if block is not None:
                source = (rank - step) % world
                yield shift_keys(self.tiles[source], self._needed[rank][source]), *open_block(block)

    def _publish(self, k: Tensor, v: Tensor) -> Window:
        """Offer the rows of k, v [1, h_kv, n, d] that others have a use for."""
        rows = max((span.stop - span.start for span in self._offered if span is not None),
                   default=0)
        mine = self._offered[self._comm.rank]

        def write(block: Tensor) -> None:
            if mine is not None:
                fill_block(block, k[:, :, mine], v[:, :, mine])

        return self._comm.publish("prefill keys", (rows, *block_shape(k)[1:]), k, write)

    def _fetch(self, window: Window, step: int, k: Tensor) -> tuple[Transfer, Tensor | None]:
        """Start to fetch what this rank needs of the keys of the rank `step` places back."""
        world = self._comm.world

        def select(block: Tensor, receiver: int) -> Tensor | None:
            owner = (receiver - step) % world
            rows = self._needed[receiver][owner]
            if rows is None:
                return None
            first = self._offered[owner].start
            return block[rows.start - first:rows.stop - first]

        rows = self._needed[self._comm.rank][(self._comm.rank - step) % world]
        into = None if rows is None else k.new_empty((rows.stop - rows.start,
                                                      *block_shape(k)[1:]))
        transfer = window.fetch(step, into, select)
        if step + 1 == world:
            window.close()
        return transfer, into


def _attend_owned(reading: Reading, q: Tensor, k: Tensor, v: Tensor, window: int | None,
                  scale: float) -> Tensor:
    """out [1, h, n, d], the same on every rank, of queries that all have; k and v are its own."""
    comm, mask = reading.comm, reading.mask(window)
    kernel = _few_queries(q, k)
    tiles = _plan((Run(reading.part.begin, 1, q.shape[2]),), reading.keys(comm.rank, window), mask,
                  kernel.bands, kernel.packed)
    if tiles:
        total = AttentionSum(q, _call(reading, mask, kernel, scale), [tiles])
        total.add(tiles, k, v)
        out, lse = total.result()
    else:
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    return out if comm.world == 1 else _join(comm, out, lse)


def _join(comm: RingComm, out: Tensor, lse: Tensor) -> Tensor:
    """Attention over the keys of all ranks from each one's out [1, h, n, d] and lse [1, h, n].

    A partial result is divided by its own softmax sum; their mean weighted by exp(lse) is that of
    all. Every rank adds in the order of the ranks, so all get the same.
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    mine = torch.cat((out.to(wide), lse.to(wide).unsqueeze(-1)), dim=-1).contiguous()
    parts = [torch.empty_like(mine) for _ in range(comm.world)]
    dist.all_gather(parts, mine, group=comm.group)
    joined = torch.stack(parts)
    weights = joined[..., -1:].softmax(dim=0)
    return (joined[..., :-1] * weights).sum(dim=0).to(out.dtype)


def _few_queries(q: Tensor, k: Tensor) -> Kernel:
    """A kernel for a few queries and a number of keys that differs from call to call.

    cuDNN compiles a graph for every such number, which takes longer than the attention.
    """
    flash = KERNELS["flash"]
    return flash if flash.refuse(q, k) is None else choose_kernel("auto", q, k, mask=Mask())


def _call(reading: Reading, mask: Mask, kernel: Kernel, scale: float) -> Call:
    return Call(comm=reading.comm, layout=LAYOUT, mask=mask, kernel=kernel, softmax_scale=scale,
                seq_len=reading.part.begin + reading.part.padded_len(reading.comm.world))


@functools.lru_cache(maxsize=512)
def _plan(queries: tuple[Run, ...], keys: tuple[Run, ...], mask: Mask, bands: bool,
          packed: bool) -> tuple[Tile, ...]:
    return fit_tiles(plan_tiles(queries, keys, mask), bands=bands, packed=packed)
