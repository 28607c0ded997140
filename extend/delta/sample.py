"""A small sample of the base, kept with an adapter: enough to know a fine-tune of it again.

`extend_lineage.safetensors` holds up to 256 values of every parameter in the base's own dtype, at
positions that follow from the parameter's name and size alone (bytes of SHAKE-256, so no
version of any library changes them). A merge reads the target at the same positions and knows
cosine, drift and equal fraction within a few per cent, without the base.

Positions are drawn independently, and a parameter of no more elements is kept whole.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from extend.checkpoint import Checkpoint, TensorInfo, read_header, write_safetensors
from extend.delta.lineage import Lineage, collect, match
from extend.delta.moments import Moments, require_finite, sampled_moments
from extend.delta.parallel import side_by_side
from extend.errors import CheckpointError

SAMPLE_NAME = "extend_lineage.safetensors"
_SCHEMA = "1"
_VALUES = 256  # of a parameter
_LEAST = 16  # of a parameter, in models of very many
_TOTAL = 2**17  # of a model, which models of many experts would exceed at 256 each


@dataclass(frozen=True)
class Sample:
    """Values of a base.

    Attributes:
        infos: parameter -> name, dtype and shape in the base.
        values: parameter -> [m], in the base's dtype, at `positions`.
        label: the file, for messages.
    """

    infos: Mapping[str, TensorInfo]
    values: Mapping[str, torch.Tensor]
    label: str


def positions(name: str, shape: tuple[int, ...], count: int) -> torch.Tensor:
    """[min(count, elements)], int64: flat indices into a parameter, all of them if they are few."""
    elements = math.prod(shape)
    if elements <= count:
        return torch.arange(elements)
    seed = f"{name}:{'x'.join(map(str, shape))}".encode()
    drawn = np.frombuffer(hashlib.shake_256(seed).digest(8 * count), dtype="<u8")
    return torch.from_numpy((drawn % np.uint64(elements)).astype(np.int64))


def take_sample(checkpoint: Checkpoint, infos: Mapping[str, TensorInfo]) -> Sample:
    """The sample of a model; only the pages that hold its values are read.

    Args:
        infos: the model's `parameter_infos`.
    """
    count = min(_VALUES, max(_LEAST, _TOTAL // max(1, len(infos))))
    names = sorted(infos)
    values = side_by_side(lambda name: checkpoint.stored(name).take(
        positions(name, infos[name].shape, count)), names)
    return Sample({name: infos[name] for name in names}, dict(zip(names, values, strict=True)),
                  str(checkpoint.directory))


def write_sample(checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], directory: Path) -> Path:
    """Write `take_sample` into an adapter's directory, and return the file's path."""
    sample, path = take_sample(checkpoint, infos), directory / SAMPLE_NAME
    metadata = {"format": "pt", "schema": _SCHEMA, "shapes": json.dumps(
        {name: info.shape for name, info in sample.infos.items()})}
    stored = [info._replace(shape=tuple(sample.values[name].shape))
              for name, info in sample.infos.items()]
    write_safetensors(path, stored, sample.values.__getitem__, metadata)
    return path


def read_sample(directory: Path) -> Sample | None:
    """Read the sample of an adapter's base; None when the adapter has none.

    Raises:
        CheckpointError: a damaged file, or one of another schema.
    """
    path = directory / SAMPLE_NAME
    if not path.is_file():
        return None
    headers = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in headers}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if metadata.get("schema") != _SCHEMA:
        raise CheckpointError(f"{path}: of schema {metadata.get('schema')}, not {_SCHEMA}, the "
                              "only one this version reads; extract the adapter again")
    try:
        shapes = {name: tuple(map(int, shape))
                  for name, shape in json.loads(metadata["shapes"]).items()}
        fits = shapes.keys() == values.keys() and all(
            value.dim() == 1 and len(value) == len(positions(name, shapes[name], len(value)))
            for name, value in values.items())
    except (KeyError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise CheckpointError(f"{path}: its values do not fit the shapes it names; extract the "
                              "adapter again, or remove the file to merge without this check")
    return Sample({name: TensorInfo(name, headers[name].dtype, shapes[name]) for name in values},
                  values, str(path))


def compare_with_sample(sample: Sample, target: Checkpoint,
                        infos: Mapping[str, TensorInfo]) -> Lineage:
    """Estimate what `compare` would measure against the whole base.

    Only the sampled positions of the target are read. Its rows that the base lacks are not
    compared, nor are the base's rows that the target lacks.

    Args:
        infos: the target's `parameter_infos`.

    Raises:
        CheckpointError: a sampled value of the target is infinite or NaN.
        CompatibilityError: as `extend.delta.lineage.match`.
    """
    def estimate(name: str) -> Moments:
        shape = shared[name]
        base, elements = sample.values[name], math.prod(shape)
        index = positions(name, sample.infos[name].shape, len(base))
        inside = index < elements
        there = target.stored(name).take(index[inside])
        moments = sampled_moments(base[inside], there, elements)
        require_finite(moments, name, str(target.directory))
        return moments

    shared = match(sample.infos, infos, sample.label, str(target.directory))
    moments = dict(zip(shared, side_by_side(estimate, shared), strict=True))
    return collect(shared, sample.infos, infos, moments, sampled=True)
