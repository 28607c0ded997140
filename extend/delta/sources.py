"""What a merge adds to a target: the deltas of an adapter, or of two whole models.

A source names the parameters that it changes and gives each delta in blocks of rows, so that a
merge holds no more of it than a block. All deltas are fp32, at weight 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Protocol

import torch

from extend.adapter_format.peft_files import Adapter
from extend.adapter_format.sidecar import RopeChange
from extend.delta.pair import ModelPair, open_pair

Rows = slice | EllipsisType
RowsDelta = Callable[[Rows], torch.Tensor]
"""Rows of a parameter -> their fp32 delta, a tensor of its own that the caller may write to."""


class DeltaSource(Protocol):
    """Something that changes parameters of a model.

    Attributes:
        label: names the source in messages, such as its directory.
    """

    label: str

    @property
    def names(self) -> frozenset[str]:
        """The parameters that it changes, such as `model.layers.0.mlp.up_proj.weight`."""

    @property
    def rope(self) -> RopeChange | None:
        """The RoPE before and after; None where the source does not know it."""

    def read(self, name: str) -> RowsDelta:
        """The whole delta of one of `names`, at weight 1."""


@dataclass(frozen=True)
class AdapterDelta:
    """The deltas of a LoRA adapter: scaling * lora_B @ lora_A, and those of its sidecar.

    Attributes:
        sidecar: False leaves the sidecar's deltas of norms, biases and embeddings out.
    """

    adapter: Adapter
    sidecar: bool = True

    @property
    def label(self) -> str:
        return str(self.adapter.directory)

    @property
    def names(self) -> frozenset[str]:
        side = self.adapter.sidecar.tensors if self.adapter.sidecar and self.sidecar else ()
        return frozenset([f"{module}.weight" for module in self.adapter.modules]) | {*side}

    @property
    def rope(self) -> RopeChange | None:
        return self.adapter.sidecar.rope if self.adapter.sidecar is not None else None

    def read(self, name: str) -> RowsDelta:
        """See `DeltaSource`; both factors, or the whole delta of the sidecar, are held."""
        module = self.adapter.modules.get(name.removesuffix(".weight"))
        if module is not None:
            lora_a, lora_b = self.adapter.read_factors(module.name)
            return lambda rows: (lora_b[rows] @ lora_a).mul_(module.scaling)
        whole = self.adapter.read_side_delta(name)
        return lambda rows: whole[rows].clone()


@dataclass(frozen=True)
class ModelDelta:
    """tuned - base, with no LoRA between: every parameter, also those that did not change."""

    pair: ModelPair

    @classmethod
    def open(cls, base: Path | str, tuned: Path | str) -> "ModelDelta":
        """See `open_pair` for what is refused."""
        return cls(open_pair(base, tuned))

    @property
    def label(self) -> str:
        return f"{self.pair.tuned.directory} - {self.pair.base.directory}"

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.pair.infos)

    @property
    def rope(self) -> RopeChange:
        return RopeChange.between(self.pair.base_config, self.pair.tuned_config)

    def read(self, name: str) -> RowsDelta:
        """See `DeltaSource`; the two tensors are mapped, not held."""
        base, tuned = self.pair.base.read(name), self.pair.tuned.read(name)
        return lambda rows: tuned[rows].to(torch.float32, copy=True).sub_(base[rows])
