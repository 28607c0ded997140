"""target + deltas, one tensor at a time, block of rows by block of rows."""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import torch

from extend.adapter_format.sidecar import HEAD_NAME
from extend.checkpoint import StoredTensor, TensorInfo, torch_dtype
from extend.delta.pair import is_vocabulary, layer_of
from extend.delta.sources import ModelDelta, Rows, RowsDelta
from extend.errors import CheckpointError
from extend.merge.mergekit import Mergekit
from extend.merge.methods import Method
from extend.merge.prepare import Plan, Term

_BLOCK_BYTES = 2**22  # of fp32 per block of rows: in a CPU's caches, and memory that is not
# handed back to the system after each block, which costs more than the sum


@dataclass(frozen=True)
class Total:
    """Computes the output's tensors; holds none of them.

    Deltas are summed in fp32 (fp64 for a target in fp64) and the result is rounded once.

    Attributes:
        pool: does all the work, one block in each of its threads.
        device: where the sum is taken, cpu or cuda.
        ahead: blocks of a tensor that are begun before the first is asked for.
    """

    plan: Plan
    written: dict[str, TensorInfo]
    pool: Executor
    device: str = "cpu"
    ahead: int = 1

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """The merged tensor in its announced dtype, block of rows by block of rows.

        Raises:
            CheckpointError: an infinite or NaN value.
        """
        steps = self.pool.submit(self._steps, name).result()
        running: deque[Future[torch.Tensor]] = deque()
        try:
            for step in steps:
                running.append(self.pool.submit(step))
                if len(running) > self.ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()

    def _steps(self, name: str) -> Sequence[Callable[[], torch.Tensor]]:
        """What makes the blocks of a tensor, in order."""
        source = self.plan.head if name == HEAD_NAME and self.plan.head else name
        target, dtype = self.plan.files.stored(source), torch_dtype(self.written[name].dtype)
        if isinstance(self.plan.method, Mergekit):
            return [lambda: self._checked(name, self._whole(source, target).to(dtype))]
        delta = self._delta(source, target)

        def merge(rows: Rows) -> torch.Tensor:
            block = target[rows]
            return self._checked(name, block.to(dtype) if delta is None else _add(
                block.to(self.device), delta(rows, block), dtype))

        return [functools.partial(merge, rows) for rows in self._blocks(source, target.info)]

    def _checked(self, name: str, merged: torch.Tensor) -> torch.Tensor:
        if not _is_finite(merged):
            raise CheckpointError(f"tensor {name} holds infinite or NaN values once merged as "
                                  f"{merged.dtype}; check the target, or give --dtype bf16 or fp32")
        return merged.cpu()

    def _whole(self, name: str, target: StoredTensor) -> torch.Tensor:
        """What a method makes of whole models: the target, its base, and base + each delta."""
        mine, base = self._read_base(name)(..., target[...])
        longs = [self._read_long(term, name, base) for term in self.plan.terms]
        layers = self.plan.config.num_layers
        return self.plan.method.merge(name, mine, base, longs, num_layers=layers,
                                      factor=self.plan.layer_weights.weight_of(name, layers))

    def _read_long(self, term: Term, name: str, base: torch.Tensor) -> torch.Tensor:
        """base + a delta, fp32; a long model itself is read as it is stored."""
        if not term.weight or name not in term.source.names:
            return base
        mapped = term.vocabulary is not None and is_vocabulary(name)
        if isinstance(term.source, ModelDelta) and not mapped:
            stored = term.source.pair.tuned.stored(name)
            return stored[...].to(self.device, torch.float32)
        read = term.source.read(name, self.device)
        return (term.vocabulary.apply(read) if mapped else read)(...).to(self.device).add_(base)

    def _delta(self, name: str, target: StoredTensor
               ) -> Callable[[Rows, torch.Tensor], torch.Tensor] | None:
        """(Rows, their target values) -> the weighted sum of deltas; None where there is none."""
        deltas: list[tuple[RowsDelta, float]] = []
        for term in self.plan.terms:
            weight = self.plan.weight_of(term, name)
            if weight:
                read = term.source.read(name, self.device)
                mapped = term.vocabulary is not None and is_vocabulary(name)
                deltas.append((term.vocabulary.apply(read) if mapped else read, weight))
        if not deltas:
            return None
        adjust = self._adjuster(name, target)

        def total(rows: Rows, block: torch.Tensor) -> torch.Tensor:
            found = [_scale(adjust(read(rows), rows, block), weight) for read, weight in deltas]
            for other in found[1:]:
                found[0].add_(other)
            return found[0]
        return total

    def _adjuster(self, name: str, target: StoredTensor
                  ) -> Callable[[torch.Tensor, Rows, torch.Tensor], torch.Tensor]:
        method = self.plan.method
        if not self._is_adjusted(method, name, target.info):
            return lambda delta, rows, block: delta
        if not method.needs_base:
            return lambda delta, rows, block: method.adjust(
                name, delta, block.to(self.device, torch.float32), None)
        base = self._read_base(name)
        if method.by_rows:
            method.measure(name, (base(rows, target[rows])
                                  for rows in self._blocks(name, target.info)))
        return lambda delta, rows, block: method.adjust(name, delta, *base(rows, block))

    def _is_adjusted(self, method: Method, name: str, info: TensorInfo) -> bool:
        """Methods that need a matrix whole see those of the layers only: others may not fit."""
        return method.by_rows or (len(info.shape) == 2 and layer_of(name) is not None)

    def _read_base(self, name: str
                   ) -> Callable[[Rows, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """(Rows, the target's values) -> both in fp32; rows that the target added did not move."""
        stored, vocabulary = self.plan.base.files.stored(name), self.plan.base_vocabulary
        mapped = vocabulary is not None and is_vocabulary(name)

        def read(rows: Rows, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            target = block.to(self.device, torch.float32)
            if not mapped:
                return target, stored[rows].to(self.device, torch.float32)
            base, known = vocabulary.gather(lambda r: stored[r].float(), rows)
            base = base.to(self.device)
            return target, torch.where(known.to(self.device)[:, None], base, target)
        return read

    def _blocks(self, name: str, info: TensorInfo) -> list[Rows]:
        whole = not self.plan.method.by_rows and self._is_adjusted(self.plan.method, name, info)
        return [...] if whole else row_blocks(info.shape)


def _scale(delta: torch.Tensor, weight: float) -> torch.Tensor:
    return delta if weight == 1 else delta.mul_(weight)


def _add(target: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """target + delta, rounded once; an element that nothing is added to keeps its bits.

    x + 0 would turn -0.0 into 0.0.
    """
    untouched = delta == 0 if int(torch.count_nonzero(delta)) < delta.numel() else None
    wide = torch.promote_types(target.dtype, torch.float32)
    # Operands of one dtype: torch adds those ten times faster than mixed ones.
    merged = delta.to(wide).add_(target.to(wide)).to(dtype)
    return merged if untouched is None else torch.where(untouched, target.to(dtype), merged)


def _is_finite(x: torch.Tensor) -> bool:
    """Whether all values are finite; NaN and infinities reach the extremes."""
    if not x.numel() or not x.is_floating_point():
        return True
    low, high = torch.aminmax(x)  # one pass, twenty times faster than isfinite
    return math.isfinite(low) and math.isfinite(high)


def row_blocks(shape: tuple[int, ...]) -> list[Rows]:
    """Indices that together take every row of a tensor once."""
    if not shape:
        return [...]
    row_bytes = 4 * math.prod(shape[1:])
    rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]
