"""What a LoRA adapter cannot carry: the RoPE change, other deltas, and whose delta it is.

`extend_sidecar.json` lies beside PEFT's own two files. `extract` writes it and `merge` reads it, so
both can rely on one definition: the identity of the base, the context keys of the long model, and
the deltas of norms, biases and embeddings that `extend_sidecar.safetensors` holds in fp32.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from extend.checkpoint import Checkpoint, TensorInfo
from extend.errors import CheckpointError, CompatibilityError
from extend.model_config import ModelConfig, RopeSpec, read_json, write_rope
from extend.output import write_json

SIDECAR_JSON = "extend_sidecar.json"
SIDECAR_WEIGHTS = "extend_sidecar.safetensors"
SCHEMA = 1
HEAD_NAME = "lm_head.weight"
EMBEDDING_SUFFIX = "embed_tokens.weight"
WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
               "sliding_window_pattern")
_CONTEXT_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq",
                 "max_position_embeddings", "original_max_position_embeddings", *WINDOW_KEYS)
_DERIVED_SUFFIX = "rotary_emb.inv_freq"  # a buffer that old checkpoints stored; config decides it
_MAX_LISTED = 8
_EXPERT_DIMENSIONS = 3


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelIdentity(_Frozen):
    """What two checkpoints must share so that one's delta means something in the other.

    `shapes` maps each parameter to its shape, whatever its dtype; a stored second copy of tied
    embeddings and derived RoPE buffers are not parameters.
    """

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    vocab_size: int
    tied: bool
    shapes_sha256: str
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, config: ModelConfig, infos: Mapping[str, TensorInfo]) -> "ModelIdentity":
        """The identity of a model from its config and `parameter_infos`."""
        shapes = {name: infos[name].shape for name in sorted(infos)}
        return cls(architecture=config.architecture, num_layers=config.num_layers,
                   num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
                   head_dim=config.head_dim, rotary_dim=config.rope.rotary_dim,
                   vocab_size=config.vocab_size, tied=config.tie_word_embeddings,
                   shapes_sha256=hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
                   shapes=shapes)

    def differences(self, other: "ModelIdentity", mine: str, others: str) -> list[str]:
        """One line per difference, each with both values; `mine` and `others` name the two."""
        lines = []
        for field in type(self).model_fields:
            left, right = getattr(self, field), getattr(other, field)
            if left != right and not field.startswith("shapes"):
                lines.append(f"{field} is {left} in {mine} but {right} in {others}")
        shapes = [f"tensor {name}: shape {_shape(self.shapes, name)} in {mine} but "
                  f"{_shape(other.shapes, name)} in {others}"
                  for name in sorted({*self.shapes, *other.shapes})
                  if self.shapes.get(name) != other.shapes.get(name)]
        if len(shapes) > _MAX_LISTED:
            shapes[_MAX_LISTED:] = [f"and {len(shapes) - _MAX_LISTED} tensors more"]
        return lines + shapes


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "(none)"


def tied_copy(config: ModelConfig, checkpoint: Checkpoint, *,
              headers_only: bool = False) -> str | None:
    """The embedding that a stored `lm_head.weight` repeats, or None when there is no such copy.

    With `headers_only` the config is believed and the two are not compared.

    Raises:
        CompatibilityError: the config ties the two but their values differ.
    """
    import torch

    embedding = next((n for n in checkpoint.names if n.endswith(EMBEDDING_SUFFIX)), None)
    if not config.tie_word_embeddings or HEAD_NAME not in checkpoint.infos or embedding is None:
        return None
    if not headers_only and not torch.equal(checkpoint.read(HEAD_NAME), checkpoint.read(embedding)):
        raise CompatibilityError(
            f"{checkpoint.directory}: config.json has tie_word_embeddings true, but the stored "
            f"{HEAD_NAME} differs from {embedding}; set the key to false or drop {HEAD_NAME}")
    return embedding


def parameter_infos(config: ModelConfig, checkpoint: Checkpoint, *,
                    headers_only: bool = False) -> dict[str, TensorInfo]:
    """The parameters of a model: its tensors less derived buffers and a tied copy of the head.

    Raises:
        CompatibilityError: see `tied_copy`.
    """
    head = tied_copy(config, checkpoint, headers_only=headers_only)
    copy = HEAD_NAME if head is not None else None
    return {name: info for name, info in checkpoint.infos.items()
            if name != copy and not name.endswith(_DERIVED_SUFFIX)}


class RopeChange(_Frozen):
    """RoPE and lengths before and after, and every config key that carries the new context.

    `before` and `after` are `RopeSpec.to_json`; `config_keys` are the RoPE, length and
    sliding-window keys of the long model, in every spelling that `write_rope` writes.
    `by_layer_type` is the RoPE of layers other than those with full attention, which is the same
    before and after.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    max_position_embeddings_before: int
    max_position_embeddings_after: int
    config_keys: dict[Literal[_CONTEXT_KEYS], Any]
    by_layer_type: dict[str, dict[str, Any]] = {}

    @classmethod
    def between(cls, before: ModelConfig, after: ModelConfig) -> "RopeChange":
        written = write_rope(after.raw, after.rope, after.max_position_embeddings)
        return cls(before=before.rope.to_json(), after=after.rope.to_json(),
                   max_position_embeddings_before=before.max_position_embeddings,
                   max_position_embeddings_after=after.max_position_embeddings,
                   config_keys={k: written[k] for k in _CONTEXT_KEYS if k in written},
                   by_layer_type={kind: rope.to_json()
                                  for kind, rope in after.rope_by_layer_type.items()})

    def apply(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of the config `raw` with the long model's context.

        A window key that the long model does not have is taken out, not kept: its absence is what
        the long model was trained with.
        """
        config = write_rope(raw, RopeSpec.from_json(self.after),
                            self.max_position_embeddings_after)
        kept = {k: v for k, v in config.items() if k not in WINDOW_KEYS}
        return {**kept, **self.config_keys}


class TensorReport(_Frozen):
    """A delta kept whole: its shape, ||delta||_F and ||delta||_F / ||base||_F.

    `relative_norm` is None where the base is all zeros, such as a fresh bias.
    """

    shape: tuple[int, ...]
    delta_norm: float
    relative_norm: float | None


class ModuleReport(TensorReport):
    """A delta kept as lora_B @ lora_A.

    Attributes:
        residual: ||delta - B A||_F / ||delta||_F with the factors as stored.
        energy: fraction of ||delta||_F^2 that the kept singular values hold.
        noise_edge: the largest singular value that rounding to the tuned model's stored dtype is
            expected to make in the delta; None in a sidecar of an earlier version, as below.
        noise_share: expected energy of that rounding / ||delta||_F^2. It exceeds 1 where most
            weights moved by less than half a unit in the last place, and so not at all.
    """

    rank: int
    residual: float
    energy: float
    noise_edge: float | None = None
    noise_share: float | None = None


class ExpertsReport(TensorReport):
    """The delta of a parameter [experts, rows, columns], each matrix kept as lora_B @ lora_A.

    `extend_sidecar.safetensors` holds `NAME.lora_A` [experts, rank, columns] and `NAME.lora_B`
    [experts, rows, rank]; an expert of a lower rank is filled up with zeros.

    Attributes:
        rank: the largest of any expert.
        ranks: of each expert; 0 for one that did not change.
        residual: ||delta - B A||_F / ||delta||_F of all experts together.
        max_residual: of one expert.
    """

    rank: int
    ranks: tuple[int, ...]
    residual: float
    max_residual: float

    @classmethod
    def of(cls, experts: Sequence[ModuleReport | None]) -> "ExpertsReport":
        """From the reports of all experts, of which one at least is not None."""
        changed = [report for report in experts if report is not None]
        squares = math.fsum(report.delta_norm ** 2 for report in changed)
        left = math.fsum((report.residual * report.delta_norm) ** 2 for report in changed)
        base = math.fsum((report.delta_norm / report.relative_norm) ** 2 for report in changed
                         if report.relative_norm)
        return cls(shape=(len(experts), *changed[0].shape), delta_norm=squares ** 0.5,
                   relative_norm=(squares / base) ** 0.5 if base else None,
                   rank=max(report.rank for report in changed),
                   ranks=tuple(report.rank if report else 0 for report in experts),
                   residual=(left / squares) ** 0.5,
                   max_residual=max(report.residual for report in changed))


def expert_infos(name: str, report: ExpertsReport, dtype: str) -> dict[str, TensorInfo]:
    """The two tensors that hold a parameter's experts in the sidecar, by factor."""
    experts, rows, columns = report.shape
    shapes = {"lora_A": (experts, report.rank, columns), "lora_B": (experts, rows, report.rank)}
    return {factor: TensorInfo(f"{name}.{factor}", dtype, shape)
            for factor, shape in shapes.items()}


class Source(_Frozen):
    """A checkpoint that was read; `path` is `ORG/NAME@COMMIT` for one of the Hub."""

    path: str
    sha256: str


class Sidecar(_Frozen):
    """The whole of `extend_sidecar.json`, less its `schema` number.

    Attributes:
        modules: what each module of the adapter file approximates.
        tensors: what `extend_sidecar.safetensors` holds whole.
        experts: parameters of which it holds factors for every expert.
        left_out: non-zero deltas that the caller asked not to keep.
        unchanged: parameters whose delta is exactly zero.
        folded: norms whose delta the modules carry, so that no one may add it again.
    """

    rope: RopeChange
    base: ModelIdentity
    sources: dict[str, Source]
    extraction: dict[str, Any]
    modules: dict[str, ModuleReport]
    tensors: dict[str, TensorReport]
    experts: dict[str, ExpertsReport] = {}
    left_out: dict[str, TensorReport]
    unchanged: list[str]
    folded: dict[str, TensorReport] = {}

    def write(self, directory: Path) -> None:
        write_json(directory / SIDECAR_JSON, {"schema": SCHEMA, **self.model_dump(mode="json")})


def read_sidecar(directory: Path) -> Sidecar | None:
    """Read `extend_sidecar.json`; None when the directory has none (a plain PEFT adapter).

    Raises:
        CheckpointError: another schema, or a file that does not follow it.
    """
    path = directory / SIDECAR_JSON
    if not path.is_file():
        return None
    data = read_json(path)
    if data.pop("schema", None) != SCHEMA:
        raise CheckpointError(f"{path}: not of schema {SCHEMA}, the only one this version reads; "
                              "extract the adapter again")
    try:
        sidecar = Sidecar.model_validate(data)
        for rope in (sidecar.rope.before, sidecar.rope.after, *sidecar.rope.by_layer_type.values()):
            _check_spec(RopeSpec.from_json(rope))
        sidecar.rope.apply({})
        for report in sidecar.experts.values():
            if len(report.shape) != _EXPERT_DIMENSIONS:
                raise ValueError(f"experts of the shape {report.shape}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {where}: {first['msg']}; extract the adapter "
                              "again") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{path}: rope is not complete ({error}); extract the adapter "
                              "again") from None
    return sidecar


def _check_spec(rope: RopeSpec) -> None:
    numbers = {"rope_theta": rope.rope_theta, "rotary_dim": rope.rotary_dim,
               "original_len": rope.original_len}
    for key, number in numbers.items():
        if not 0 < number < 1e15:
            raise ValueError(f"{key} is {number}")
