"""GPUs that share memory, simulated down to the driver: streams are queues of operations.

Nothing runs before `Machine.run`, which then takes any operation that stands first in its stream
and is ready, as chance has it. Flags are those of the product: words in (CPU) memory, written and
waited for through the driver's two calls.
"""

import ctypes
from collections import deque
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from extend.ring.peer_cuda import CudaBuffer, StreamWords, first_flags, flags_begin


class Operation(NamedTuple):
    kind: str
    what: object
    is_ready: object = lambda: True
    run: object = lambda: None


class Machine:
    """Some GPUs, each with a current and a side stream."""

    def __init__(self, world):
        self.streams = [{"current": deque(), "side": deque()} for _ in range(world)]
        self.buffers = []  # of each: the bytes of every rank

    def run(self, order, until_stuck=False):
        """Execute everything that was enqueued, or as much of it as can be.

        Streams keep their place in the order for a while: that finds more than choosing anew each
        time, since whole runs of operations then overtake others.
        """
        queues = [queue for streams in self.streams for queue in streams.values()]
        while any(queues):
            if order.random() < 0.2:
                order.shuffle(queues)
            ready = next((queue for queue in queues if queue and queue[0].is_ready()), None)
            if ready is None and until_stuck:
                return
            assert ready is not None, f"deadlock: {self.heads()}"
            ready.popleft().run()

    def heads(self):
        return [{n: q[0][:2] for n, q in s.items() if q} for s in self.streams]


class Mark:
    def __init__(self, gpu):
        self.gpu, self.come = gpu, False
        gpu.enqueue(Operation("mark", self, run=partial(setattr, self, "come", True)))

    def wait(self):
        self.gpu.enqueue(Operation("wait for mark", self, self.has_come))

    def has_come(self):
        return self.come


class Driver:
    """The two calls of the CUDA driver; a stream's handle is its number on the machine."""

    def __init__(self, machine):
        self.machine = machine

    def cuStreamWriteValue32_v2(self, stream, address, value, flags):
        assert flags == 0
        word = ctypes.c_uint32.from_address(address)
        write = partial(setattr, word, "value", value)
        return self.enqueue(stream, Operation("write", (address, value), run=write))

    def cuStreamWaitValue32_v2(self, stream, address, value, flags):
        assert flags == 1  # equal
        word = ctypes.c_uint32.from_address(address)
        operation = Operation("wait", (address, value), lambda: word.value == value)
        return self.enqueue(stream, operation)

    def enqueue(self, stream, operation):
        rank, name = stream
        self.machine.streams[rank][name].append(operation)
        return 0


class Handle:
    """What torch gives for memory that is mapped everywhere; by seats, not by ranks."""

    def __init__(self, memories):
        self.memories = memories
        self.buffer_ptrs = [memory.data_ptr() for memory in memories]

    def get_buffer(self, seat, shape, dtype):
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.memories[seat][:size].view(dtype).view(shape)


class Gpu:
    """One rank's GPU, as the transport sees it."""

    buffer_class = CudaBuffer

    def __init__(self, machine, rank):
        self.machine, self.rank, self.name, self.allocated = machine, rank, "current", 0

    def enqueue(self, operation):
        self.machine.streams[self.rank][self.name].append(operation)

    def allocate(self, size_bytes):
        world, buffers = len(self.machine.streams), self.machine.buffers
        flags_at, flags = flags_begin(size_bytes), first_flags(world)
        if self.allocated == len(buffers):
            memories = [torch.full((flags_at + flags.nbytes,), 255, dtype=torch.uint8)
                        for _ in range(world)]  # fmt: skip
            for memory in memories:
                memory[flags_at:].view(torch.int32).copy_(flags)
            buffers.append((size_bytes, memories))
        allocated, memories = buffers[self.allocated]
        assert allocated == size_bytes  # all ranks ask for the same, in the same order
        self.allocated += 1
        seats = [(rank + 1) % world for rank in range(world)]
        own = memories[seats[self.rank]][flags_at:].view(torch.int32)
        words = StreamWords(Driver(self.machine), lambda: (self.rank, self.name))
        return self.buffer_class(Handle(memories), seats, self.rank, flags_at, words, own.tolist)

    @contextmanager
    def side(self):
        now = Mark(self)
        self.name = "side"
        now.wait()
        yield
        self.name = "current"

    def issue(self, work):
        self.enqueue(Operation("run", work, run=work))

    def mark(self):
        return Mark(self)

    def is_capturing(self):
        return False


class OneQueue(Gpu):
    """A GPU whose streams share one hardware queue."""

    @contextmanager
    def side(self):
        yield


class Notes:
    """A watchdog that only listens."""

    def __init__(self):
        self.told = []

    def watch(self, awaited):
        self.told.append(awaited)

