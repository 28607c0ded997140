import logging
from types import SimpleNamespace

import pytest
import torch

from extend.errors import CompatibilityError
from extend.ring import choose
from extend.ring.attention import CAUSAL_MASK
from extend.ring.balance import imbalance
from extend.ring.call import Call
from extend.ring.choose import MEMORY_SHARE, Choice, choose_among, choose_strategy, gpu_kind
from extend.ring.comm import RingComm
from extend.ring.cost.hardware import find_hardware
from extend.ring.cost.predict import candidates, predict
from extend.ring.kernels import KERNELS
from extend.ring.mask import Mask
from extend.ring.strategies import build_strategy
from tests.spawn import spawn

GIB = 2**30


def prediction(seconds, gib):
    return SimpleNamespace(
        seconds=seconds, peak_bytes=gib * GIB, explain=lambda: f"takes {seconds} s"
    )


THREE = {"slow": prediction(3e-3, 1), "fast": prediction(1e-3, 9), "middle": prediction(2e-3, 4)}


def test_the_fastest_is_chosen_and_the_reason_names_the_others():
    assert choose_among(THREE, 9 * GIB) == Choice(
        "fast", "takes 0.001 s; against middle 2.00 ms, slow 3.00 ms"
    )


def test_of_nearly_equal_ones_the_smallest_is_chosen():
    close = {"fast": prediction(1e-3, 9), "small": prediction(1.02e-3, 4),
             "other": prediction(1.01e-3, 5)}
    assert choose_among(close, 9 * GIB).name == "small"
    assert choose_among(close | {"small": prediction(1.04e-3, 4)}, 9 * GIB).name == "other"


def test_what_needs_too_much_memory_is_left_out():
    assert choose_among(THREE, 9 * GIB - 1) == Choice(
        "middle", "takes 0.002 s; against fast 1.00 ms but too much memory, slow 3.00 ms"
    )


def test_where_none_fits_the_smallest_is_chosen():
    assert choose_among(THREE, GIB / 2) == Choice(
        "slow",
        "takes 0.003 s; none stays under 0.5 GiB, this takes the least; against "
        "fast 1.00 ms but too much memory, middle 2.00 ms but too much memory",
    )


def test_a_choice_of_one_or_none():
    assert choose_among({"fast": THREE["fast"]}, 9 * GIB) == Choice("fast", "takes 0.001 s")
    with pytest.raises(CompatibilityError, match="no strategy fits these heads and ranks"):
        choose_among({}, GIB)


def test_one_rank_and_the_cpu_take_the_ring():
    q = torch.zeros(1, 8, 4, 8)
    call = Call(RingComm.alone(), "zigzag", Mask(), KERNELS["flash_cpu"], 1.0, 4)
    assert choose_strategy(call, q, q) == Choice("ring", "one rank")
    name, reason = choose_strategy(fake_call(world=8), q, q)
    assert name == "ring" and "on the CPU" in reason


def fake_call(world, hosts=1, layout="zigzag", mask=CAUSAL_MASK, kernel="fa4"):
    """A call on one of `world` ranks that does not know which."""
    comm = SimpleNamespace(world=world, hosts=hosts)
    return SimpleNamespace(comm=comm, layout=layout, mask=mask, kernel=KERNELS[kernel])


def fake_tensor(heads, local_len):
    """bf16 on a GPU."""
    return SimpleNamespace(
        shape=torch.Size((1, heads, local_len, 128)), device=torch.device("cuda", 0),
        element_size=lambda: 2,
    )  # fmt: skip


H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * GIB)


@pytest.fixture
def gpu(monkeypatch):
    """What the GPU says of itself."""
    found = SimpleNamespace(**vars(H100))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    forget()
    yield found
    forget()


def forget():
    choose._choose.cache_clear()
    choose.gpu_kind.cache_clear()


FACTS = {
    "8 ranks": {"world": 8},
    "2 ranks, cudnn": {"world": 2, "kernel": "cudnn"},
    "4 hosts": {"world": 32, "hosts": 4},
    "hosts of 4": {"world": 8, "hosts": 2},
    "a window": {"world": 8, "mask": Mask(window=4096)},
    "no mask": {"world": 4, "layout": "contiguous", "mask": Mask(causal=False)},
}


def predictions_for(call, local_len, hardware):
    world, mask = call.comm.world, call.mask
    per_host = world // call.comm.hosts
    return {
        name: predict(
            name, heads=32, kv_heads=8, head_dim=128, seq_len=local_len * world, world=world,
            gpus_per_host=per_host, layout=call.layout, causal=mask.causal, window=mask.window,
            hardware=hardware,
        )
        for name in candidates(32, world, per_host)
    }  # fmt: skip


def choose_for(call, local_len):
    return choose_strategy(call, fake_tensor(32, local_len), fake_tensor(8, local_len))


@pytest.mark.parametrize("local_len", [2048, 131072])
@pytest.mark.parametrize("facts", FACTS)
def test_the_choice_is_the_fastest_by_the_model(gpu, facts, local_len):
    call = fake_call(**FACTS[facts])
    hardware = find_hardware("h100", FACTS[facts].get("kernel", "fa4"))
    predictions = predictions_for(call, local_len, hardware)
    choice = choose_for(call, local_len)
    assert choice == choose_among(predictions, 80 * GIB * MEMORY_SHARE)
    assert all(name in choice.reason for name in predictions)


def choose_on_a_rank(rank, world):
    torch.cuda.get_device_properties = lambda device: H100
    calls = [
        Call(RingComm(), facts.get("layout", "zigzag"), facts.get("mask", Mask()),
             KERNELS[facts.get("kernel", "fa4")], 1.0, world * local_len)
        for facts in FACTS.values() for local_len in (2048, 131072)
    ]  # fmt: skip
    return [choose_for(call, call.seq_len // world) for call in calls]


def test_all_ranks_choose_alike():
    first, *others = spawn(4, choose_on_a_rank)
    assert len({choice.name for choice in first}) > 1
    assert all(choices == first for choices in others)


def test_less_memory_changes_the_choice(gpu):
    call, hardware = fake_call(**FACTS["a window"]), find_hardware("h100", "fa4")
    peaks = {name: p.peak_bytes for name, p in predictions_for(call, 131072, hardware).items()}
    gpu.total_memory = 1000 * GIB
    fastest = choose_for(call, 131072).name
    forget()
    gpu.total_memory = int(peaks[fastest] / MEMORY_SHARE) - 4 * GIB
    choice = choose_for(call, 131072)
    assert choice.name != fastest and peaks[choice.name] <= gpu.total_memory * MEMORY_SHARE
    assert f"{fastest} " in choice.reason and "but too much memory" in choice.reason


def test_gpus_of_one_kind_may_differ_by_some_mib(gpu):
    device = torch.device("cuda", 0)
    assert gpu_kind(device) == ("NVIDIA H100 80GB HBM3", 80 * GIB)
    for less in (1, GIB):
        forget()
        gpu.total_memory = 80 * GIB - less
        assert gpu_kind(device) == ("NVIDIA H100 80GB HBM3", 76 * GIB)
    assert gpu_kind(torch.device("cpu")) == ("cpu", 0)


def test_documents_count_as_they_fall_on_the_ranks(gpu, monkeypatch):
    """Seen are the predictions that are chosen from."""
    seen = []
    monkeypatch.setattr(choose, "choose_among", lambda p, limit: seen.append(p) or Choice("", ""))
    world, local_len = 2, 65536
    even, uneven = (Mask(cu_seqlens=(0, cut, 131072)) for cut in (65536, 100000))
    for mask in (even, uneven):
        call = fake_call(world, mask=mask)
        choose_for(call, local_len)
    weight = imbalance("zigzag", world * local_len, world, uneven)
    assert imbalance("zigzag", world * local_len, world, even) == 1 < weight
    for name in ("ring", "all-gather", "ulysses"):
        before, after = (predictions[name] for predictions in seen)
        factor = 1 if name == "ulysses" else weight  # of whole documents every rank has some heads
        assert after.compute_seconds == pytest.approx(factor * before.compute_seconds)
        assert after.seconds - before.seconds == pytest.approx(
            after.compute_seconds - before.compute_seconds
        )


def test_the_reason_is_logged_once(gpu, caplog):
    with caplog.at_level(logging.INFO, logger="extend.ring.choose"):
        for _ in range(3):
            choice = choose_for(fake_call(8), 4096)
    assert [r.getMessage() for r in caplog.records] == [f"ring attention: {choice.reason}"]


def build_candidates(rank, world):
    """Build whatever "auto" may choose, for some numbers of heads and hosts."""
    built = []
    for heads in (1, 6, 8, 12):
        q, k = torch.empty(1, heads, 4, 8), torch.empty(1, 1, 4, 8)
        call = Call(RingComm(), "zigzag", Mask(), KERNELS["flash_cpu"], 1.0, 4 * world)
        for per_host in (1, 2, world):
            for name in candidates(heads, world, per_host):
                built.append((name, type(build_strategy(name, call, q, k)).__name__))
    return set(built)


def test_whatever_may_be_chosen_can_be_built():
    four, three = spawn(4, build_candidates)[0], spawn(3, build_candidates)[0]
    assert four == {
        ("ring", "Ring"), ("all-gather", "AllGather"), ("ulysses", "Ulysses"), ("usp:2", "Ulysses"),
        ("double-ring:2", "Ring"), ("double-ring:4", "Ring"),
    }  # fmt: skip
    assert ("double-ring:3", "Ring") in three and not any("usp" in name for name, _ in three)
