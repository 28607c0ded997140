"""Carry the delta of a norm's gain inside the deltas of the linear weights that the norm feeds.

An RMSNorm multiplies its output channels by a gain g, and a linear weight W after it computes
W diag(g) x. So the long model's W' and g' act on the base's g like

    W' diag(g' / g),

and the delta W' diag(g' / g) - W says all that the norm had to say. An engine that takes nothing
but lora_A and lora_B then gets it too. This is exact at full rank; at a lower one the norm's share
competes for it.

To add a family: one line in `FAMILIES`, one test. A norm stands there only if what it feeds is
nothing but linear weights of its own layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from extend.adapter_format.sidecar import TensorReport
from extend.checkpoint import Checkpoint, TensorInfo
from extend.checkpoint.read import StoredTensor
from extend.delta.pair import ModelPair, frobenius, layer_of
from extend.errors import CompatibilityError

_NORM = "norm.weight"


class Feeds(NamedTuple):
    """What the norms of a family feed.

    Attributes:
        linears: norm -> the modules after it, both by their names within a layer.
        one_plus: the gain is 1 + weight.
    """

    linears: Mapping[str, tuple[str, ...]]
    one_plus: bool = False


@dataclass(frozen=True, slots=True)
class ScaledTensor:
    """A linear weight W' [out, in] on disk that is read as W' diag(ratio), in fp32."""

    stored: StoredTensor
    ratio: torch.Tensor

    def __getitem__(self, rows: Any) -> torch.Tensor:
        return self.read(rows)

    def part(self, row: int) -> "ScaledTensor":
        """See `StoredTensor.part`."""
        return ScaledTensor(self.stored.part(row), self.ratio)

    def fetch(self) -> None:
        """See `StoredTensor.fetch`."""
        self.stored.fetch()

    def read(self, rows: Any = ..., *, pin: bool = False) -> torch.Tensor:
        """Rows of it; see `StoredTensor.read`."""
        scaled = self.stored.read(rows).float() * self.ratio
        return scaled.pin_memory() if pin else scaled


@dataclass(frozen=True, kw_only=True)
class FoldedTuned:
    """The tuned checkpoint with norms folded: base's norms, and linear weights to match.

    It has what a `ModelPair` asks of a checkpoint and nothing more, so that no reader can go round
    the folding.
    """

    pair: ModelPair
    gains: Mapping[str, str]
    one_plus: bool

    @property
    def directory(self) -> Path:
        return self.pair.tuned.directory

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self.pair.tuned.infos

    def stored(self, name: str) -> StoredTensor | ScaledTensor:
        """One tensor, to be read in blocks of rows."""
        if name in self.gains.values():
            return self.pair.base.stored(name)
        stored = self.pair.tuned.stored(name)
        return ScaledTensor(stored, self.ratio(self.gains[name])) if name in self.gains else stored

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU."""
        return self.stored(name)[...]

    def ratio(self, norm: str) -> torch.Tensor:
        """g' / g [in] in fp32; 1 where both are zero."""
        base, tuned = (self._gain(files, norm) for files in (self.pair.base, self.pair.tuned))
        return torch.where(base == tuned, 1.0, tuned / base)

    def _gain(self, files: Checkpoint, norm: str) -> torch.Tensor:
        return files.stored(norm)[...].float() + (1.0 if self.one_plus else 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Folding:
    """A pair to extract from, and what became of each norm whose gain has moved.

    Attributes:
        pair: its linear deltas hold those of the folded norms, whose own deltas are zero.
        folded: their deltas as they were.
        left: name -> why it is not folded.
    """

    pair: ModelPair
    folded: dict[str, TensorReport] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def fold_norms(pair: ModelPair) -> Folding:
    """Fold the delta of every norm that feeds linear weights of its layer only.

    Raises:
        CompatibilityError: a family for which it is not known what its norms feed.
    """
    family = str(pair.base_config.raw.get("model_type"))
    if family not in FAMILIES:
        raise CompatibilityError(f"fold_norms: what the norms of model_type {family!r} feed is not "
                                 f"known, only of {', '.join(FAMILIES)}; leave fold_norms out, and "
                                 "their deltas go to the sidecar")
    feeds = FAMILIES[family]
    whole = FoldedTuned(pair=pair, gains={}, one_plus=feeds.one_plus)
    gains: dict[str, str] = {}
    folding = Folding(pair=pair)
    for norm in sorted(name for name in pair.infos if name.endswith(_NORM)):
        delta = pair.tuned.read(norm).float() - pair.base.read(norm).float()
        if not bool(delta.any()):
            continue
        linears = _fed(norm, feeds, pair.infos)
        problem = _problem(norm, linears, whole.ratio(norm))
        if problem:
            folding.left[norm] = problem
            continue
        gains.update(dict.fromkeys(linears, norm))
        base_norm = frobenius(pair.base.read(norm).float())
        folding.folded[norm] = TensorReport(
            shape=tuple(delta.shape), delta_norm=frobenius(delta),
            relative_norm=frobenius(delta) / base_norm if base_norm else None)
    tuned = FoldedTuned(pair=pair, gains=gains, one_plus=feeds.one_plus)
    return replace(folding, pair=replace(pair, tuned=tuned))


def _fed(norm: str, feeds: Feeds, infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """The weights that a norm feeds; () where it feeds something else."""
    if layer_of(norm) is None:
        return ()
    prefix, _, name = norm.removesuffix(".weight").rpartition(".")
    names = tuple(f"{prefix}.{linear}.weight" for linear in feeds.linears.get(name, ()))
    return names if all(n in infos for n in names) else ()


def _problem(norm: str, linears: tuple[str, ...], ratio: torch.Tensor) -> str | None:
    if not linears:
        return "it does not feed linear weights alone"
    bad = int((~torch.isfinite(ratio)).sum())
    return f"{bad} of its gains are zero in the base" if bad else None


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA = Feeds({"input_layernorm": _QKV, "post_attention_layernorm": _MLP})
# The second norm feeds the router as well, which takes no LoRA.
_EXPERTS = Feeds({"input_layernorm": _QKV})
_GEMMA = Feeds({"input_layernorm": _QKV, "pre_feedforward_layernorm": _MLP}, one_plus=True)
# Source: the decoder layer and RMSNorm of each family, transformers 5.23, models/*/modeling_*.py.
FAMILIES: dict[str, Feeds] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "phi3": Feeds({"input_layernorm": ("self_attn.qkv_proj",),
                   "post_attention_layernorm": ("mlp.gate_up_proj",)}),
    "gemma": Feeds(_LLAMA.linears, one_plus=True),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
}
