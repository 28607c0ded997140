"""The strategy behind "auto": the fastest that fits, and why."""

import functools
import logging
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from extend.errors import CompatibilityError
from extend.ring.balance import imbalance
from extend.ring.call import Call
from extend.ring.cost.hardware import find_hardware
from extend.ring.cost.predict import Prediction, candidates, predict
from extend.ring.kernels import KERNELS
from extend.ring.mask import Mask
from extend.ring.strategies import parse_strategy

logger = logging.getLogger(__name__)

# What one attention call may take of a GPU; the rest is for weights, activations and the kernel.
MEMORY_SHARE = 0.25

# Predictions differ from measured times by several per cent.
NEARLY = 1.03


class Choice(NamedTuple):
    """A strategy and the reason it was chosen for, one line."""

    name: str
    reason: str


def choose_strategy(call: Call, q: Tensor, k: Tensor) -> Choice:
    """The strategy for tensors like q [b, h, s, d] and k [b, h_kv, s, d].

    All ranks choose alike: nothing but shapes, the kernel, the number of hosts and the kind of GPU
    counts. On the CPU it is the ring, which takes the least memory.
    """
    if call.comm.world == 1:
        return Choice("ring", "one rank")
    if q.device.type != "cuda":
        return Choice("ring", "on the CPU memory counts, and the ring takes the least")
    kernel = next(name for name, member in KERNELS.items() if member is call.kernel)
    return _choose(
        tuple(q.shape), k.shape[1], q.element_size(), call.comm.world, call.comm.hosts, call.layout,
        call.mask, kernel, *gpu_kind(q.device),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def gpu_kind(device: torch.device) -> tuple[str, int]:
    """Name and memory, in bytes to the next lower 4 GiB, of a GPU; what the ranks must agree on.

    Two GPUs of one kind may differ by some MiB.
    """
    if device.type != "cuda":
        return device.type, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.total_memory >> 32 << 32


@functools.lru_cache(maxsize=512)
def _choose(
    shape: tuple[int, ...], num_kv_heads: int, value_bytes: int, world: int, hosts: int,
    layout: str, mask: Mask, kernel: str, gpu: str, memory_bytes: int,
) -> Choice:  # fmt: skip
    batch, num_heads, local_len, head_dim = shape
    per_host = world // hosts
    predictions = {
        name: predict(
            name, heads=num_heads, kv_heads=num_kv_heads, head_dim=head_dim,
            seq_len=local_len * world, world=world, gpus_per_host=per_host, layout=layout,
            causal=mask.causal, window=mask.window, documents=len(mask.cu_seqlens or (0, 0)) - 1,
            value_bytes=value_bytes, batch=batch, hardware=find_hardware(gpu, kernel),
        )
        for name in candidates(num_heads, world, per_host)
    }  # fmt: skip
    if mask.cu_seqlens:
        predictions = {
            name: _with_documents(prediction, name, layout, local_len * world, world, mask)
            for name, prediction in predictions.items()
        }
    choice = choose_among(predictions, memory_bytes * MEMORY_SHARE)
    logger.info("ring attention: %s", choice.reason)
    return choice


def _with_documents(
    prediction: Prediction, name: str, layout: str, seq_len: int, world: int, mask: Mask
) -> Prediction:
    """The model takes documents to be of one length; real ones load some ranks more than others."""
    family, number = parse_strategy(name)
    parts = world // {"ulysses": world, "usp": number}.get(family, 1)
    more = prediction.compute_seconds * (imbalance(layout, seq_len, parts, mask) - 1)
    return replace(
        prediction, seconds=prediction.seconds + more,
        compute_seconds=prediction.compute_seconds + more,
    )  # fmt: skip


def choose_among(predictions: dict, limit_bytes: float) -> Choice:
    """The fastest prediction under `limit_bytes`; the smallest one if none is.

    Those within NEARLY of the fastest count as equal, and the one with the least memory is taken:
    what it leaves keeps more activations.

    Raises:
        CompatibilityError: there is none to choose from.
    """
    if not predictions:
        raise CompatibilityError("no strategy fits these heads and ranks")
    ranked = sorted(predictions, key=lambda name: predictions[name].seconds)
    fitting = [name for name in ranked if predictions[name].peak_bytes <= limit_bytes]
    equal = [n for n in fitting
             if predictions[n].seconds <= NEARLY * predictions[fitting[0]].seconds]
    best = min(equal or ranked, key=lambda n: predictions[n].peak_bytes)
    others = ", ".join(
        f"{name} {1e3 * predictions[name].seconds:.2f} ms"
        + ("" if name in fitting else " but too much memory")
        for name in ranked if name != best
    )  # fmt: skip
    why = predictions[best].explain()
    if not fitting:
        why += f"; none stays under {limit_bytes / 2**30:.1f} GiB, this takes the least"
    return Choice(best, f"{why}; against {others}" if others else why)
