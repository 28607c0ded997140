"""Tensors that wait for their backward, in the memory of the host or as fewer bits.

Layers put theirs in order and take them back in the reverse order. On a GPU the copies run on a
stream of their own, beside the computation: what a layer put goes out while the next one computes,
and while a layer takes its own, all of the layer before it comes in.
"""

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from extend.errors import TrainingError

Form = Literal["exact", "fp8"]
_FP8 = torch.float8_e4m3fn
_SMALLEST_BYTES = 2**20  # below it a copy costs more than the memory is worth


@dataclass(slots=True, eq=False)
class _Item:
    """A tensor that was put.

    Attributes:
        layer: a number of whose it is, higher for later ones.
        parts: what it was turned into: itself, or values and scales.
        host: copies of the parts in pinned memory; None where they stayed on the device.
        begun: the parts again on the device, on their way.
        ready: what to wait for before they are used.
    """

    layer: int
    dtype: torch.dtype
    form: Form
    parts: list[Tensor] | None
    host: list[Tensor] | None = None
    begun: list[Tensor] | None = None
    ready: Any = None


class Store:
    """Holds tensors until they are asked for, the last ones first.

    Args:
        device: where they come from and go back to.
        host_bytes: of pinned memory at most; 0 keeps all on the device.
        form: `fp8` holds values in 8 bits with one scale for each vector of the last dimension:
            a relative error of about 2.6 % of each value (root mean square), 6.25 % at most.
    """

    def __init__(self, device: torch.device, host_bytes: int = 0, form: Form = "exact"):
        self.device, self.form = device, form
        self._free_bytes, self._most_bytes = host_bytes, host_bytes
        self._pinned_bytes = 0
        self._blocks: dict[int, list[Tensor]] = {}  # pinned memory that is not in use, by size
        self._registered: dict[int, Tensor] = {}  # all that is pinned, by its address
        weakref.finalize(self, _unregister, self._registered).atexit = False
        self._layer = 0
        self._waiting: dict[int, list[_Item]] = {}  # by layer
        self._leaving: _Item | None = None  # the last one that was sent to the host
        on_gpu = device.type == "cuda" and host_bytes > 0
        self._out = torch.cuda.Stream(device) if on_gpu else None
        self._in = torch.cuda.Stream(device) if on_gpu else None

    def begin_layer(self) -> None:
        """What is put from now on is taken together, before what was put so far."""
        self._layer += 1

    def put(self, tensor: Tensor) -> "Tensor | _Item":
        """Hand a tensor over; small ones and integers are held as they are."""
        if not tensor.is_floating_point() or _num_bytes([tensor]) < _SMALLEST_BYTES:
            return tensor
        parts = quantize(tensor) if self.form == "fp8" else [tensor]
        item = _Item(self._layer, tensor.dtype, self.form, parts)
        if self._free_bytes >= _num_bytes(parts):
            self._send(item)
        elif self.form == "exact":
            return tensor
        self._waiting.setdefault(item.layer, []).append(item)
        return item

    def take(self, item: "Tensor | _Item") -> Tensor:
        """The tensor again; the rest of its layer, and the layer before it, are sent for."""
        if isinstance(item, Tensor):
            return item
        self._let_go()
        self._fetch(item)
        self._forget(item)
        self._send_for(item.layer)
        parts = self._arrive(item)
        return dequantize(*parts, item.dtype) if item.form == "fp8" else parts[0]

    def _forget(self, item: _Item) -> None:
        """It waits no more."""
        layer = self._waiting.get(item.layer, [])
        if item in layer:
            layer.remove(item)
        if not layer:
            self._waiting.pop(item.layer, None)

    def _send_for(self, layer: int) -> None:
        """Begin the way back of what waits of a layer, and of the one that was put before it."""
        before = max((number for number in self._waiting if number < layer), default=None)
        for item in [*self._waiting.get(layer, []), *self._waiting.get(before, [])]:
            self._fetch(item)

    def _send(self, item: _Item) -> None:
        """Copy to the host beside the computation until the next one is sent.

        Computing waits for the copy before it, so that its memory is given back in order. Were that
        left to `record_stream`, it would stay taken for as long as the host is ahead of the GPU,
        which may be a whole forward pass.
        """
        self._let_go()
        item.host = [self._pinned(part) for part in item.parts]
        if self._out is None:
            for host, part in zip(item.host, item.parts, strict=True):
                host.copy_(part)
            item.parts = None
            return
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            for host, part in zip(item.host, item.parts, strict=True):
                host.copy_(part, non_blocking=True)
            item.ready = self._out.record_event()
        self._leaving = item

    def _let_go(self) -> None:
        """Give back the device's memory of what was sent last, once it is copied."""
        item, self._leaving = self._leaving, None
        if item is not None:
            torch.cuda.current_stream(self.device).wait_event(item.ready)
            item.parts = None

    def _fetch(self, item: _Item) -> None:
        """Begin the way back, if it lies on the host and was not begun."""
        if item.host is None or item.begun is not None:
            return
        if self._in is None:
            item.begun = [host.to(self.device, copy=True) for host in item.host]
            return
        # Made on the computing stream, whose memory it will be; filled on the other once that
        # memory is free and the copy to the host is done. Computing waits for the copy before it
        # uses it, so that memory needs no `record_stream` either.
        item.begun = [torch.empty_like(host, device=self.device) for host in item.host]
        self._in.wait_stream(torch.cuda.current_stream(self.device))
        self._in.wait_event(item.ready)
        with torch.cuda.stream(self._in):
            for begun, host in zip(item.begun, item.host, strict=True):
                begun.copy_(host, non_blocking=True)
            item.ready = self._in.record_event()

    def _arrive(self, item: _Item) -> list[Tensor]:
        if item.host is None:
            parts, item.parts = item.parts, None
            return parts
        if item.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(item.ready)
        # The host memory may be given to others: who writes there next waits for this stream.
        for host in item.host:
            block = host.flatten().view(torch.uint8)
            self._blocks.setdefault(block.numel(), []).append(block)
            self._free_bytes += block.numel()
        parts, item.begun, item.host = item.begun, None, None
        return parts

    def _pinned(self, part: Tensor) -> Tensor:
        """Pinned memory of the part's size; what was used before is used again."""
        size = _num_bytes([part])
        self._free_bytes -= size
        blocks = self._blocks.get(size)
        flat = blocks.pop() if blocks else self._new_block(size)
        return flat.view(part.dtype).view(part.shape)

    def _new_block(self, size: int) -> Tensor:
        if self._pinned_bytes + size > self._most_bytes:
            self._release()
        block = torch.empty(size, dtype=torch.uint8)
        if self._out is not None:  # not pin_memory=True, which rounds up to a power of two
            _check(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), size, 0))
            self._registered[block.data_ptr()] = block
        self._pinned_bytes += size
        return block

    def _release(self) -> None:
        """Give memory of other sizes back to the system."""
        idle = [block for blocks in self._blocks.values() for block in blocks]
        if self._out is not None and idle:
            torch.cuda.synchronize(self.device)
            _unregister({p: self._registered.pop(p) for p in [b.data_ptr() for b in idle]})
        self._pinned_bytes -= _num_bytes(idle)
        self._blocks.clear()


def _unregister(blocks: dict[int, Tensor]) -> None:
    """Memory that is given back while it is pinned could not be pinned again by others."""
    for pointer in blocks:
        _check(torch.cuda.cudart().cudaHostUnregister(pointer))


def _check(code: Any) -> None:
    if int(code):
        raise TrainingError(f"pinning or freeing host memory failed (code {int(code)}); lower "
                            "host_memory")


def _num_bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def quantize(tensor: Tensor) -> list[Tensor]:
    """fp8 values and fp32 scales [..., 1], so that the largest of each vector is the largest fp8.

    Source: the row-wise scaling of torch's float8 products (e4m3, largest value 448).
    """
    largest = tensor.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-30)
    scale = largest / torch.finfo(_FP8).max
    return [(tensor / scale.to(tensor.dtype)).clamp(-448, 448).to(_FP8), scale]


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) * scale.to(dtype)
