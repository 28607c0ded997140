"""target + deltas, one tensor at a time, block of rows by block of rows."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from extend.adapter_format.sidecar import HEAD_NAME
from extend.checkpoint import StoredTensor, TensorInfo, torch_dtype
from extend.delta.pair import is_vocabulary, layer_of
from extend.delta.sources import Rows, RowsDelta
from extend.errors import CheckpointError
from extend.merge.methods import Method
from extend.merge.prepare import Plan

_BLOCK_BYTES = 2**24  # fp32 scratch per block of rows; small enough to stay in a CPU's caches


@dataclass(frozen=True)
class Total:
    """Computes the output's tensors; holds none of them.

    Deltas are summed in fp32 (fp64 for a target in fp64) and the result is rounded once.

    Attributes:
        device: where the sum is taken, cpu or cuda.
    """

    plan: Plan
    written: dict[str, TensorInfo]
    device: str = "cpu"

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """The merged tensor in its announced dtype, block of rows by block of rows.

        Raises:
            CheckpointError: an infinite or NaN value.
        """
        source = self.plan.head if name == HEAD_NAME and self.plan.head else name
        target, dtype = self.plan.files.stored(source), torch_dtype(self.written[name].dtype)
        delta = self._delta(source, target)
        for rows in self._blocks(source, target.info):
            block = target[rows]
            merged = block.to(dtype) if delta is None else _add(
                block.to(self.device), delta(rows, block), dtype)
            if merged.is_floating_point() and not bool(torch.isfinite(merged).all()):
                raise CheckpointError(f"tensor {name} holds infinite or NaN values once merged as "
                                      f"{dtype}; check the target, or give --dtype bf16 or fp32")
            yield merged.cpu()

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
            found = [adjust(read(rows), rows, block).mul_(weight) for read, weight in deltas]
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


def _add(target: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """target + delta, rounded once; an element that nothing is added to keeps its bits.

    x + 0 would turn -0.0 into 0.0.
    """
    untouched = delta == 0
    wide = torch.promote_types(target.dtype, torch.float32)
    merged = delta.to(wide).add_(target).to(dtype)
    return torch.where(untouched, target.to(dtype), merged) if bool(untouched.any()) else merged


def row_blocks(shape: tuple[int, ...]) -> list[Rows]:
    """Indices that together take every row of a tensor once."""
    if not shape:
        return [...]
    row_bytes = 4 * math.prod(shape[1:])
    rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]
