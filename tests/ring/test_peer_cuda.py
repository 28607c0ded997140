"""What the CUDA driver is asked for: which words, which values, in which order."""

import ctypes
import types

import pytest
import torch

from extend.ring import peer_cuda
from extend.ring.peer_cuda import CudaBuffer, Flags, StreamWords, first_flags, flags_begin

STREAM = 0x5EA


class Driver:
    """Notes its calls; from the one of number `fails` on it refuses."""

    def __init__(self, fails=None):
        self.calls, self.fails = [], fails

    def note(self, *call):
        self.calls.append(call)
        return 801 if self.fails is not None and len(self.calls) > self.fails else 0

    def cuStreamWriteValue32_v2(self, stream, address, value, flags):
        assert (stream, flags) == (STREAM, 0)  # CU_STREAM_WRITE_VALUE_DEFAULT: with a fence
        return self.note("write", address, value)

    def cuStreamWaitValue32_v2(self, stream, address, value, flags):
        assert (stream, flags) == (STREAM, 1)  # CU_STREAM_WAIT_VALUE_EQ
        return self.note("wait", address, value)


class Handle:
    """torch's, for three processes whose memory begins at 1000, 2000 and 3000."""

    buffer_ptrs = (1000, 2000, 3000)

    def get_buffer(self, *arguments):
        return arguments


def buffer_of(rank, driver, look=lambda: None):
    """Ranks 0, 1, 2 sit in seats 2, 0, 1 and so have their flags at 3256, 1256 and 2256."""
    words = StreamWords(driver, lambda: STREAM)
    return CudaBuffer(Handle(), (2, 0, 1), rank, flags_begin(200), words, look)


def test_words_and_values_of_each_method():
    # Behind 256 bytes of data: three words "written", of ranks 0 to 2, then three words "read".
    driver = Driver()
    buffer = buffer_of(1, driver)
    buffer.wait_until_read()
    assert driver.calls == [
        ("wait", 1256 + 12, 1), ("wait", 1256 + 20, 1),
        ("write", 1256 + 12, 0), ("write", 1256 + 20, 0),
    ]  # fmt: skip
    driver.calls.clear()
    buffer.say_written()
    assert driver.calls == [("write", 3256 + 4, 1), ("write", 2256 + 4, 1)]
    driver.calls.clear()
    buffer.wait_until_written(2)
    assert driver.calls == [("wait", 1256 + 8, 1)]
    driver.calls.clear()
    buffer.say_read(2)
    assert driver.calls == [("write", 1256 + 8, 0), ("write", 2256 + 16, 1)]


def test_views_are_of_the_owners_seat():
    view = buffer_of(1, Driver()).view(0, torch.Size((2, 3)), torch.bfloat16)
    assert view == (2, (2, 3), torch.bfloat16)


def test_where_flags_begin_and_what_they_are_at_first():
    assert [flags_begin(size) for size in (1, 255, 256, 257)] == [256, 256, 256, 512]
    want = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32)
    torch.testing.assert_close(first_flags(3), want)


def test_looking_tells_what_was_said_to_this_rank():
    flags = buffer_of(1, Driver(), lambda: [1, 0, 0, 0, 1, 1]).look()
    assert flags == Flags(written=[True, False, False], read=[False, True, True])
    assert buffer_of(1, Driver(), lambda: None).look() is None


@pytest.mark.parametrize("fails", range(4))
def test_a_refusal_of_the_driver_is_an_error(fails):
    driver = Driver(fails)
    what = "wait for" if fails < 2 else "write"
    with pytest.raises(RuntimeError, match=rf"driver cannot {what} a flag .*\(error 801\)"):
        buffer_of(1, driver).wait_until_read()
    assert len(driver.calls) == fails + 1


class ContextDriver(Driver):
    """Does nothing for a thread until the context of its GPU is the current one."""

    def __init__(self, retains=True):
        super().__init__()
        self.is_current, self.retains = False, retains

    def note(self, *call):
        return super().note(*call) if self.is_current else 201

    def cuDeviceGet(self, device, number):
        device._obj.value = 70 + number
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 1000 + device.value
        return 0 if self.retains else 2

    def cuCtxSetCurrent(self, context):
        assert context.value == 1073
        self.is_current = True
        return 0


def test_a_thread_that_never_called_cuda_gets_the_context_of_its_gpu():
    driver = ContextDriver()
    words = StreamWords(driver, lambda: STREAM, gpu=3)
    words.wait([8])
    words.write([8, 12], 0)
    assert driver.calls == [("wait", 8, 1), ("write", 8, 0), ("write", 12, 0)]


def test_a_context_that_cannot_be_had_is_an_error():
    words = StreamWords(ContextDriver(retains=False), lambda: STREAM, gpu=3)
    with pytest.raises(RuntimeError, match=r"cannot find the context of GPU 3 \(error 2\)"):
        words.write([8], 1)


@pytest.fixture
def library(monkeypatch):
    """A libcuda.so.1 of which only the names and argument types are looked at."""
    names = ("WriteValue32_v2", "WaitValue32_v2")
    found = {f"cuStream{name}": types.SimpleNamespace() for name in names}
    found["cuThreadExchangeStreamCaptureMode"] = types.SimpleNamespace()
    found = types.SimpleNamespace(**found)
    libraries = {"libcuda.so.1": found}
    monkeypatch.setattr(peer_cuda.ctypes, "CDLL", libraries.__getitem__)
    peer_cuda.load_driver.cache_clear()
    yield found
    peer_cuda.load_driver.cache_clear()


def test_handles_and_addresses_go_to_the_driver_whole(library):
    assert peer_cuda.load_driver() is library
    for name in ("cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2"):
        stream, address, value, flags = getattr(library, name).argtypes
        assert stream is ctypes.c_void_p and address is ctypes.c_uint64
        assert value is ctypes.c_uint32 and flags is ctypes.c_uint


def test_a_driver_that_is_too_old_is_noticed(library):
    del library.cuStreamWaitValue32_v2
    with pytest.raises(AttributeError, match="cuStreamWaitValue32_v2"):
        peer_cuda.load_driver()
