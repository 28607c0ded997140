"""FlashAttention 2, 3 and 4 through torch's flash operator: bands and packed documents.

torch brings version 2. Versions 3 and 4 come from packages of their own and take the operator's
place in the whole process (`torch.nn.attention.activate_flash_attention_impl`), so a kernel makes
sure before each call that its version is the active one, and leaves it active: other attention of
this process that runs on torch's flash kernel then runs on it, too.
"""

import contextlib
import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    register_flash_attention_impl,
    restore_flash_attention_impl,
)

from extend.ring.kernels.base import (
    HALF,
    turned,
    wrong_device,
    wrong_dtype,
    wrong_head_dim,
)
from extend.ring.kernels.cpu import Reference
from extend.ring.mask import ANTICAUSAL, CAUSAL, TileMask

aten = torch.ops.aten

FA4 = "FA4 for extend"  # torch's own "FA4" fits few releases of the package


def _register_fa4() -> object:
    from torch.nn.attention._fa4 import register_flash_attention_fa4

    return register_flash_attention_fa4(module_path="extend.ring.kernels.fa4_adapter")


register_flash_attention_impl(FA4, register_fn=_register_fa4)


class Flash:
    """bf16 and fp16, head_dim up to 256; fewer KV heads as they are.

    Args:
        version: the name in torch's registry of flash implementations; None for torch's own.
        package: what to install for it.
    """

    def __init__(self, version: str | None = None, package: str = "") -> None:
        self.version = version
        self.package = package

    @property
    def bands(self) -> bool:
        return self.version is None or _trial(self, "bands", "cuda", torch.bfloat16, 128) is None

    @property
    def packed(self) -> bool:
        return self.version is None or _trial(self, "packed", "cuda", torch.bfloat16, 128) is None

    def refuse(self, q: Tensor, k: Tensor) -> str | None:
        reason = wrong_device(q, "cuda") or wrong_dtype(q, HALF) or wrong_head_dim(q, 8, 256)
        if reason is not None or self.version is None:
            return reason
        return _trial(self, "squares", q.device, q.dtype, q.shape[-1])

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        mask, turn = self._turn(mask, q, k)
        q, k, v = turned(turn, q, k, v)
        causal, window = _operator_mask(mask, q.shape[2], k.shape[2])
        lengths = self._lengths(mask, q, k)
        _activate(self.version)

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse, *_ = aten._flash_attention_forward(
                q, k, v, lengths.cu_q, lengths.cu_k, lengths.max_q, lengths.max_k, 0.0, causal,
                False, scale=softmax_scale, **window,
            )  # fmt: skip
            return out, lse

        if lengths.cu_q is None:  # the operator is [b, s, h, d]
            out, lse = run(*(t.transpose(1, 2) for t in (q, k, v)))
        else:  # [s, h, d], a sequence at a time
            rows = (tuple(t.transpose(0, 1) for t in row) for row in zip(q, k, v, strict=True))
            out, lse = _stack([run(*row) for row in rows])
        out, lse = turned(turn, out.transpose(1, 2), lse)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, mask: TileMask, softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        mask, turn = self._turn(mask, q, k)
        dout, q, k, v, out, lse = turned(turn, dout, q, k, v, out, lse)
        causal, window = _operator_mask(mask, q.shape[2], k.shape[2])
        lengths = self._lengths(mask, q, k)
        # The state of a random generator that nothing reads: there is no dropout.
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.zeros((), dtype=torch.uint64, device=q.device)
        _activate(self.version)

        def run(lse: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return aten._flash_attention_backward(
                *tensors, lse.contiguous(), lengths.cu_q, lengths.cu_k, lengths.max_q,
                lengths.max_k, 0.0, causal, state, unused, scale=softmax_scale, **window,
            )  # fmt: skip

        tensors = dout, q, k, v, out
        if lengths.cu_q is None:
            grads = run(lse, *(t.transpose(1, 2) for t in tensors))
        else:
            rows = zip(lse, *tensors, strict=True)
            grads = _stack([run(stats, *(t.transpose(0, 1) for t in row)) for stats, *row in rows])
        dq, dk, dv = turned(turn, *(grad.transpose(1, 2) for grad in grads))
        return dq, dk, dv

    def _turn(self, mask: TileMask, q: Tensor, k: Tensor) -> tuple[TileMask, bool]:
        """A version without bands computes anti-causal squares as causal ones, rows reversed."""
        if mask[:2] != ANTICAUSAL[:2] or q.shape[2] != k.shape[2] or self.bands:
            return mask, False
        bounds = mask.cu_seqlens
        if bounds is not None:
            bounds = tuple(bounds[-1] - bound for bound in reversed(bounds))
        return CAUSAL._replace(cu_seqlens=bounds), True

    def _lengths(self, mask: TileMask, q: Tensor, k: Tensor) -> "Lengths":
        num_queries, num_keys = q.shape[2], k.shape[2]
        if mask.cu_seqlens is not None:
            return _document_lengths(mask.cu_seqlens, q.device)
        banded = mask.lo is not None or mask.hi is not None
        if self.version is None and banded and num_queries > num_keys:
            # Version 2 drops a bound that is not below the greatest number of keys, also where
            # there are more queries than keys and it binds. Given lengths, it reads that number
            # from the call, and may be told more.
            cu_q, cu_k = (_on_device((0, rows), q.device) for rows in (num_queries, num_keys))
            return Lengths(cu_q, cu_k, num_queries, num_queries)
        return Lengths(None, None, num_queries, num_keys)


class Lengths(NamedTuple):
    """Where sequences begin (int32, on the device; None: one each) and how long the longest is."""

    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int


def _operator_mask(
    mask: TileMask, num_queries: int, num_keys: int
) -> tuple[bool, dict[str, int]]:
    """(is_causal, window sizes): the operator counts both from the last query and key backwards.

    Query i sees key j iff i + shift - left <= j <= i + shift + right, shift = sk - sq. A size that
    is not given is no bound; the flag says right = 0 alone, for which there is a faster kernel.

    Raises:
        ValueError: some query sees no key, which the operator does not understand.
    """
    shift = num_keys - num_queries
    sizes = {
        "window_size_left": None if mask.hi is None else mask.hi + shift,
        "window_size_right": None if mask.lo is None else -mask.lo - shift,
    }
    given = {name: size for name, size in sizes.items() if size is not None}
    if any(size < 0 for size in given.values()):
        raise ValueError(
            f"a tile of {num_queries} x {num_keys} rows with {mask} has rows that see or are seen "
            "by nothing; tiles come from plan_tiles, which trims them"
        )
    return (True, {}) if given == {"window_size_right": 0} else (False, given)


def _stack(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """One tuple of tensors with a batch dimension from a tuple for each member of the batch."""
    if len(parts) == 1:
        return tuple(t.unsqueeze(0) for t in parts[0])
    return tuple(torch.stack(members) for members in zip(*parts, strict=True))


@functools.lru_cache(maxsize=64)
def _document_lengths(cu_seqlens: tuple[int, ...], device: torch.device) -> Lengths:
    longest = max(stop - start for start, stop in pairwise(cu_seqlens))
    on_device = _on_device(cu_seqlens, device)
    return Lengths(on_device, on_device, longest, longest)


@functools.lru_cache(maxsize=64)
def _on_device(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(cu_seqlens, dtype=torch.int32, device=device)


def _activate(version: str | None) -> None:
    if current_flash_attention_impl() == version:
        return
    if version is None:
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl(version)


@contextlib.contextmanager
def keep_active() -> Iterator[None]:
    """Whatever version is used inside, the one that was active before is active after."""
    before = current_flash_attention_impl()
    try:
        yield
    finally:
        _activate(before)


_TRIALS = {  # (query rows, key rows, mask), more than one block of any version's
    "squares": (320, 320, CAUSAL),
    "bands": (320, 288, TileMask(lo=-20, hi=100)),
    "packed": (320, 320, TileMask(lo=0, cu_seqlens=(0, 90, 320))),
}


@functools.cache
def _trial(
    kernel: Flash, what: str, device: str | torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Why `kernel` cannot be used here, found out once by using it; None if it can.

    torch's adapters and the packages behind them change apart from each other, so that a package
    that can be imported says little.
    """
    try:
        with keep_active(), torch.no_grad():
            problem = _difference(kernel, what, device, dtype, head_dim)
    except ImportError as error:
        return f"needs the package {kernel.package} ({error})"
    except Exception as error:  # whatever a package raises: it is of no use
        lines = str(error).strip().splitlines() or [""]
        problem = f"{type(error).__name__}: {lines[0][:200]}"
    if problem is None:
        return None
    return (
        f"fails its trial on {what} of head_dim {head_dim} here ({problem}); another version of "
        f"{kernel.package} may fit torch {torch.__version__}"
    )


def _difference(
    kernel: Flash, what: str, device: str | torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Run `kernel` forward and backward on a small tile and say where it is wrong, if it is."""
    num_queries, num_keys, mask = _TRIALS[what]
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, rows, heads, head_dim, generator=generator, dtype=dtype, device=device)
        .transpose(1, 2)
        for rows, heads in ((num_queries, 4), (num_keys, 2), (num_keys, 2), (num_queries, 4))
    )  # fmt: skip
    options = {"mask": mask, "softmax_scale": head_dim**-0.5}
    results = []
    for one in (kernel, Reference()):
        out, lse = one.forward(q, k, v, **options)
        results.append((out, lse, *one.backward(dout, q, k, v, out, lse, **options)))
    for name, got, expected in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
        if not error <= 0.05:  # several times what rounding to bf16 does; NaN is no less
            return f"{name} is off by {error:.0%} of its largest entry"
    return None
