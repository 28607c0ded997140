"""Choose a kernel: by name, or the fastest of those that take the tensors, by measurement."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from extend.errors import CompatibilityError
from extend.registry import lookup
from extend.ring.kernels.base import Kernel
from extend.ring.kernels.cpu import FlashCpu, Reference
from extend.ring.kernels.cuda import Cudnn, Efficient
from extend.ring.kernels.flash import FA4, Flash, keep_active
from extend.ring.kernels.measure import time_kernel
from extend.ring.mask import Mask

SHORT_WINDOW = 2048

_FLASH_ATTN_3 = "flash_attn_3, with its module flash_attn_interface"


def choose_kernel(
    name: str,
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask,
    group: Hashable = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Kernel:
    """The kernel called `name`, or for "auto" the fastest that takes `q` and `k`.

    "auto" times the candidates of the device, forward and backward, at the first call of each
    signature (GPU generation, dtype, head_dim, query heads per key head, kind of mask, `group`) and
    keeps the answer for the process. A kernel that would need many calls for one tile is a
    candidate only if no other takes the tensors: one with neither bands nor packing for a window
    under 2048 tokens (two calls for as many rows), one without packing for documents (a call each;
    cuDNN also compiles a graph for every new length). By name each stays available.

    Args:
        q: [b, h, s, d].
        k: [b, h_kv, s, d].
        mask: of the whole sequence.
        group: names the ranks that must take the same kernel, if `agree` is given.
        agree: sums a tensor of times over these ranks; "auto" calls it once a signature, so all of
            them must choose at the same call.

    Raises:
        CompatibilityError: it does not take such tensors; the message says why.
        RecipeError: no such kernel.
    """
    if name != "auto":
        kernel = lookup({"auto": None} | KERNELS, name, "kernel")
        reason = kernel.refuse(q, k)
        return kernel if reason is None else _give_up(name, q, {name: reason})
    names = CANDIDATES.get(q.device.type, CANDIDATES["cpu"])
    if len(names) == 1:
        reason = KERNELS[names[0]].refuse(q, k)
        return KERNELS[names[0]] if reason is None else _give_up(name, q, {names[0]: reason})
    signature = _signature(q, k, mask, group)
    if signature not in _chosen:
        with keep_active():
            _chosen[signature] = _fastest(names, q, k, mask, agree)
    return KERNELS[_chosen[signature]]


class Signature(NamedTuple):
    """What the fastest kernel depends on; no length, which differs from batch to batch."""

    group: Hashable
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    heads_per_key_head: int
    causal: bool
    window: int | None
    packed: bool


_chosen: dict[Signature, str] = {}


def _signature(q: Tensor, k: Tensor, mask: Mask, group: Hashable) -> Signature:
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    return Signature(
        group, capability, q.dtype, q.shape[-1], q.shape[1] // k.shape[1], mask.causal,
        mask.window, mask.cu_seqlens is not None,
    )  # fmt: skip


def _fastest(
    names: tuple[str, ...], q: Tensor, k: Tensor, mask: Mask,
    agree: Callable[[Tensor], Tensor] | None,
) -> str:  # fmt: skip
    """The name of the kernel with the least time, summed over all ranks."""
    reasons = {name: KERNELS[name].refuse(q, k) for name in names}
    takers = [name for name in names if reasons[name] is None]
    takers = [name for name in takers if not _many_calls(KERNELS[name], mask)] or takers
    times = torch.full((len(names),), torch.inf, dtype=torch.float64, device=q.device)
    for name in takers:
        try:
            alone = len(takers) == 1
            times[names.index(name)] = 0 if alone else time_kernel(KERNELS[name], q, k, mask)
        except Exception as error:  # raised later: other ranks wait for these times
            reasons[name] = f"fails here ({type(error).__name__}: {str(error)[:200]})"
    times = times if agree is None else agree(times)
    best = int(times.argmin())
    if torch.isinf(times[best]):
        _give_up("auto", q, {n: r or "is not for every rank" for n, r in reasons.items()})
    return names[best]


def _many_calls(kernel: Kernel, mask: Mask) -> bool:
    """Whether `kernel` would compute a tile of this mask in a great number of calls."""
    short = mask.window is not None and mask.window < SHORT_WINDOW
    if mask.cu_seqlens is not None or (short and not kernel.bands):
        return not kernel.packed
    return False


def _give_up(name: str, q: Tensor, reasons: dict[str, str]) -> Kernel:
    raise CompatibilityError(
        f"kernel {name!r} cannot compute q {tuple(q.shape)} {q.dtype} on {q.device}: "
        f"{'; '.join(f'{kernel} {reason}' for kernel, reason in reasons.items())}. "
        f"Cast or move q, k and v, or choose one of auto, {', '.join(KERNELS)}"
    )


# What "auto" chooses from, by type of device.
CANDIDATES: dict[str, tuple[str, ...]] = {
    "cpu": ("flash_cpu",),
    "cuda": ("fa4", "fa3", "cudnn", "flash", "efficient"),
}

KERNELS: dict[str, Kernel] = {
    "reference": Reference(),
    "flash_cpu": FlashCpu(),
    "flash": Flash(),
    "fa3": Flash("FA3", _FLASH_ATTN_3),
    "fa4": Flash(FA4, "flash-attn-4"),
    "cudnn": Cudnn(),
    "efficient": Efficient(),
}
