"""What a merge adds to a target: the deltas of an adapter, or of two whole models.

A source names the parameters that it changes and gives each delta in blocks of rows, so that a
merge holds no more of it than a block. All deltas are fp32, at weight 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import Protocol

import torch

from extend.adapter_format.peft_files import Adapter
from extend.adapter_format.sidecar import (
    EMBEDDING_SUFFIX,
    HEAD_NAME,
    ModelIdentity,
    RopeChange,
    TensorReport,
    parameter_infos,
)
from extend.adapter_format.vocabulary import read_adapter_vocabulary
from extend.checkpoint import Checkpoint, TensorInfo
from extend.delta.pair import ModelPair, open_pair
from extend.errors import CompatibilityError
from extend.model_config import ModelConfig, read_config
from extend.tokenizer import read_vocabulary

_SAME_FRAC = 0.02  # of a norm; factors rounded to bf16 differ by less than half of it
Rows = slice | EllipsisType
RowsDelta = Callable[[Rows], torch.Tensor]
"""Rows of a parameter -> their fp32 delta, a tensor of its own that the caller may write to."""


class DeltaSource(Protocol):
    """Something that changes parameters of a model.

    Attributes:
        label: names the source in messages, such as its directory.
    """

    @property
    def label(self) -> str: ...

    @property
    def names(self) -> frozenset[str]:
        """The parameters that it changes, such as `model.layers.0.mlp.up_proj.weight`."""

    @property
    def lora_names(self) -> frozenset[str]:
        """Those of `names` that get a product of LoRA factors of a linear weight."""

    @property
    def rope(self) -> RopeChange | None:
        """The RoPE before and after; None where the source does not know it."""

    @property
    def identity(self) -> ModelIdentity | None:
        """The model that it changes; None where the source does not know it."""

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        """Token -> row of that model's embedding; None where the source does not know them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one of `names` in the model that the source changes."""

    def read(self, name: str, device: str = "cpu") -> RowsDelta:
        """The whole delta of one of `names`, at weight 1, on a device."""


@dataclass(frozen=True)
class BaseModel:
    """The model that deltas and fine-tunes started from, to be compared with."""

    config: ModelConfig
    files: Checkpoint
    infos: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, directory: Path | str, *, headers_only: bool = False) -> "BaseModel":
        """See `parameter_infos` for `headers_only` and for what is refused."""
        config, files = read_config(directory), Checkpoint(directory)
        return cls(config, files, parameter_infos(config, files, headers_only=headers_only))

    @cached_property
    def identity(self) -> ModelIdentity:
        return ModelIdentity.of(self.config, self.infos)

    @cached_property
    def vocabulary(self) -> Mapping[str, int] | None:
        return read_vocabulary(self.files.directory)


@dataclass(frozen=True)
class AdapterDelta:
    """The deltas of a LoRA adapter: scaling * lora_B @ lora_A, and what lies beside the factors.

    Beside them are the deltas of our sidecar, LoRA factors of embeddings and biases of lora_B, and
    whole values (`modules_to_save`, as mergekit's extraction writes norms and embeddings), from
    which the base's values are subtracted.

    Attributes:
        sidecar: False leaves everything but the factors of linear weights out.
        base: needed for an adapter with whole values.
    """

    adapter: Adapter
    sidecar: bool = True
    base: BaseModel | None = None

    def __post_init__(self) -> None:
        if self.adapter.absolutes and self.base is None:
            few = ", ".join(sorted(self.adapter.absolutes)[:3])
            raise CompatibilityError(
                f"{self.adapter.directory}: holds whole values of {len(self.adapter.absolutes)} "
                f"parameters ({few}, ...), which would replace the target's own; give --base, the "
                "model that the adapter was made from, so that they become deltas")
        strange = [name for name in self.adapter.absolutes
                   if self.base and name not in self.base.infos and not self._is_tied_head(name)]
        if strange:
            raise CompatibilityError(
                f"{self.adapter.directory}: holds values of {strange[0]}, but the base "
                f"{self.base.files.directory} has no such parameter; give the model that the "
                "adapter was made from")

    def _is_tied_head(self, name: str) -> bool:
        return bool(name == HEAD_NAME and self.base and self.base.config.tie_word_embeddings)

    def _repeats_embedding(self, module: str) -> bool:
        """Whether factors of a tied head stand beside those of the embedding, as mergekit's do."""
        return self._is_tied_head(f"{module}.weight") and bool(self.adapter.embeddings)

    @property
    def label(self) -> str:
        return str(self.adapter.directory)

    @cached_property
    def lora_names(self) -> frozenset[str]:
        """The linear weights that get a product of factors."""
        return frozenset(f"{module}.weight" for module in self.adapter.modules
                         if not self._repeats_embedding(module))

    @property
    def _side_reports(self) -> Mapping[str, TensorReport]:
        """What the sidecar holds whole, or as factors of every expert."""
        sidecar = self.adapter.sidecar
        return {**sidecar.tensors, **sidecar.experts} if sidecar is not None else {}

    @cached_property
    def beside(self) -> frozenset[str]:
        """What the adapter changes beside linear weights, also where `sidecar` leaves it out."""
        kept = {n for n in self.adapter.absolutes if not self._is_tied_head(n)}
        return frozenset({*self._side_reports, *self.adapter.embeddings, *self.adapter.biases,
                          *kept})

    @cached_property
    def names(self) -> frozenset[str]:
        return self.lora_names | (self.beside if self.sidecar else frozenset())

    @property
    def rope(self) -> RopeChange | None:
        return self.adapter.sidecar.rope if self.adapter.sidecar is not None else None

    @property
    def identity(self) -> ModelIdentity | None:
        if self.adapter.sidecar is not None:
            return self.adapter.sidecar.base
        return self.base.identity if self.base is not None else None

    @cached_property
    def vocabulary(self) -> Mapping[str, int] | None:
        found = read_adapter_vocabulary(self.adapter.directory)
        return found if found is not None or self.base is None else self.base.vocabulary

    def shape(self, name: str) -> tuple[int, ...]:
        module = self.adapter.modules.get(name.removesuffix(".weight"))
        if module is not None:
            return (module.out_features, module.in_features)
        if name in self.adapter.embeddings:
            module = self.adapter.embeddings[name]
            return (module.in_features, module.out_features)
        if name in self.adapter.biases or name in self.adapter.absolutes:
            return self.adapter.stored_shape(name)
        return self._side_reports[name].shape

    def read(self, name: str, device: str = "cpu") -> RowsDelta:
        """See `DeltaSource`; factors are held, a delta of the sidecar is read in blocks."""
        adapter = self.adapter
        module = adapter.modules.get(name.removesuffix(".weight"))
        if module is not None:
            lora_a, lora_b = (x.to(device) for x in adapter.read_factors(module.name))
            return lambda rows: _scaled(lora_b[rows] @ lora_a, module.scaling)
        if name in adapter.embeddings:
            scaling = adapter.embeddings[name].scaling
            lora_a, lora_b = (x.to(device) for x in adapter.read_embedding_factors(name))
            self._check_tied_factors(lora_a, lora_b)
            return lambda rows: (lora_a.T[rows] @ lora_b.T).mul_(scaling)
        if name in adapter.absolutes:
            return self._read_absolute(name, device)
        if adapter.sidecar is not None and name in adapter.sidecar.experts:
            return self._read_experts(name, device)
        if name in adapter.biases:
            bias = adapter.read_bias(name)
            return lambda rows: bias[rows].to(device, copy=True)
        delta = adapter.stored_side_delta(name)
        return lambda rows: delta[rows].to(device, torch.float32)

    def _check_tied_factors(self, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        """Factors of a tied head must make the embedding's delta, lora_a^T lora_b^T, again."""
        head = HEAD_NAME.removesuffix(".weight")
        if head not in self.adapter.modules or not self._repeats_embedding(head):
            return
        head_a, head_b = (x.to(lora_a.device) for x in self.adapter.read_factors(head))
        own = float(((lora_a @ lora_a.T) * (lora_b.T @ lora_b)).sum())
        other = float(((head_a @ head_a.T) * (head_b.T @ head_b)).sum())
        both = float(((lora_a @ head_b) * (head_a @ lora_b).T).sum())
        if own + other - 2 * both > _SAME_FRAC ** 2 * max(own, other):
            raise CompatibilityError(
                f"{self.adapter.directory}: the factors of lm_head and of the embedding make "
                "different deltas, but the base ties the two; give the base that the adapter was "
                "made from")

    def _read_experts(self, name: str, device: str) -> RowsDelta:
        """Here the rows are experts, [experts, rows, columns]."""
        lora_a, lora_b = (x.to(device) for x in self.adapter.read_expert_factors(name))
        return lambda experts: lora_b[experts] @ lora_a[experts]

    def _read_absolute(self, name: str, device: str) -> RowsDelta:
        whole = self.adapter.read_absolute(name)
        if (name.endswith(EMBEDDING_SUFFIX) and HEAD_NAME in self.adapter.absolutes
                and self._is_tied_head(HEAD_NAME)
                and not torch.equal(whole, self.adapter.read_absolute(HEAD_NAME))):
            raise CompatibilityError(
                f"{self.adapter.directory}: {HEAD_NAME} differs from {name}, but the base ties the "
                "two; give the base that the adapter was made from")
        stored = self.base.files.stored(name)
        if tuple(whole.shape) != stored.info.shape:
            raise CompatibilityError(
                f"{self.adapter.directory}: {name} is {list(whole.shape)}, but "
                f"{list(stored.info.shape)} in the base {self.base.files.directory}; give the "
                "model that the adapter was made from")
        return lambda rows: whole[rows].to(device, torch.float32, copy=True).sub_(
            stored[rows].to(device, torch.float32))


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

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self.pair.infos)

    @property
    def lora_names(self) -> frozenset[str]:
        return frozenset()

    @property
    def rope(self) -> RopeChange:
        return RopeChange.between(self.pair.base_config, self.pair.tuned_config)

    @property
    def identity(self) -> ModelIdentity:
        return self.pair.identity

    @cached_property
    def vocabulary(self) -> Mapping[str, int] | None:
        return read_vocabulary(self.pair.base.directory)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.pair.infos[name].shape

    def read(self, name: str, device: str = "cpu") -> RowsDelta:
        """See `DeltaSource`; the two tensors stay on disk but for the rows asked for."""
        base, tuned = self.pair.base.stored(name), self.pair.tuned.stored(name)
        return lambda rows: tuned[rows].to(device, torch.float32, copy=True).sub_(
            base[rows].to(device, torch.float32))


def _scaled(product: torch.Tensor, scaling: float) -> torch.Tensor:
    return product if scaling == 1 else product.mul_(scaling)
