"""Embeddings and output head of which each process holds some rows of the vocabulary.

Shapes: n tokens, d hidden, v vocabulary. Process t of m holds rows from t * ceil(v / m) on, as many
or what is left, which is how DTensor cuts.
"""

from contextlib import ExitStack
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from extend.train.local import local_parameters, sum_shares


class VocabularyPart(NamedTuple):
    """The first row that this process holds, and the processes that hold the others."""

    begin: int
    group: ProcessGroup


def vocabulary_part(num_rows: int, mesh: DeviceMesh) -> VocabularyPart:
    """This process's part of `num_rows` rows."""
    size = -(-num_rows // mesh.size())
    return VocabularyPart(min(mesh.get_local_rank() * size, num_rows), mesh.get_group())


def split_head(weight: Tensor) -> tuple[Tensor, VocabularyPart | None]:
    """The rows [v, d] of a head that are here, and which they are; None: all."""
    if not isinstance(weight, DTensor):
        return weight, None
    return weight.to_local(), vocabulary_part(weight.shape[0], weight.device_mesh)


class _Lookup:
    """The hooks of an embedding: tokens of other processes give zeros, and the sum is whole."""

    def __init__(self, part: VocabularyPart, size: int):
        self.part, self.size, self._swapped = part, size, ExitStack()
        self._elsewhere: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = args[0] - self.part.begin
        self._elsewhere = (rows < 0) | (rows >= self.size)
        self._swapped.enter_context(local_parameters(module))
        return (rows.masked_fill(self._elsewhere, 0), *args[1:])

    def after(self, module: nn.Module, args: tuple, output: Tensor | None) -> Tensor | None:
        self._swapped.close()
        elsewhere, self._elsewhere = self._elsewhere, None
        if output is None:  # it raised
            return None
        found = output.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return sum_shares(found, self.part.group)


def split_embedding(embedding: nn.Embedding, mesh: DeviceMesh) -> None:
    """Let an embedding whose rows are split over `mesh` look up tokens of all rows."""
    weight = embedding.weight
    part = vocabulary_part(weight.shape[0], mesh)
    size = weight.to_local().shape[0]
    if embedding.padding_idx is not None:  # a row without gradient: here, or with another process
        row = embedding.padding_idx - part.begin
        embedding.padding_idx = row if 0 <= row < size else None
    hooks = _Lookup(part, size)
    embedding.register_forward_pre_hook(hooks.before)
    embedding.register_forward_hook(hooks.after, always_call=True)
