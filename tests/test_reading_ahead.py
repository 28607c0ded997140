"""Weights are fetched while the block runs, in order, and never more than memory is free for."""

import gc
import time

import pytest

from extend.checkpoint import ahead, reading_ahead

SPAN = 2**24


@pytest.fixture
def fetched(monkeypatch):
    found = []
    monkeypatch.setattr(ahead, "_fetch", lambda path, offset: found.append(
        (path.parent.name, path.name, offset)))
    monkeypatch.setattr(ahead, "_free_bytes", lambda: 2**40)
    return found


@pytest.fixture
def models(tmp_path):
    """Two models of 2.5 and 3 spans, of sparse files."""
    for role, sizes in {"base": [1.5, 1], "tuned": [1, 2]}.items():
        (tmp_path / role).mkdir()
        for number, spans in enumerate(sizes, start=1):
            with (tmp_path / role / f"{number}.safetensors").open("wb") as file:
                file.truncate(int(spans * SPAN))
    return tmp_path / "base", tmp_path / "tuned"


def wait_for(found, count):
    deadline = time.monotonic() + 10
    while len(found) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def test_two_models_are_fetched_side_by_side(fetched, models):
    with reading_ahead(*models, None):
        wait_for(fetched, 6)
    assert fetched == [("base", "1.safetensors", 0), ("tuned", "1.safetensors", 0),
                       ("base", "1.safetensors", SPAN), ("tuned", "2.safetensors", 0),
                       ("base", "2.safetensors", 0), ("tuned", "2.safetensors", SPAN)]


def test_no_more_than_a_share_of_the_free_memory(fetched, models, monkeypatch):
    monkeypatch.setattr(ahead, "_free_bytes", lambda: 4 * 5 * SPAN)
    with reading_ahead(*models):
        wait_for(fetched, 4)
        time.sleep(0.1)
    assert len(fetched) == 4


def test_it_stops_with_the_block_and_passes_its_error_on(fetched, models, monkeypatch):
    monkeypatch.setattr(ahead, "_fetch", lambda *place: (fetched.append(place), time.sleep(0.05)))
    with pytest.raises(KeyError), reading_ahead(*models):
        wait_for(fetched, 1)
        raise KeyError("of the block")
    count = len(fetched)
    time.sleep(0.15)
    assert count == len(fetched) < 6


def test_what_is_not_there_is_not_its_business(tmp_path, fetched):
    with reading_ahead(tmp_path / "nothing", None):
        pass
    with reading_ahead():
        pass
    assert fetched == []


def test_advice_comes_in_pieces_that_linux_takes(tmp_path, monkeypatch):
    """It drops what is beyond the disk's read_ahead_kb, which is 128 unless someone changed it."""
    asked = []
    monkeypatch.setattr(ahead.os, "posix_fadvise",
                        lambda file, offset, size, advice: asked.append((offset, size)))
    monkeypatch.setattr(ahead, "_advice_bytes", lambda device: 2**17)
    ahead.will_need(0, 1000, 2**18 + 5)
    assert asked == [(1000, 2**17), (1000 + 2**17, 2**17), (1000 + 2**18, 5)]


def test_a_disk_that_is_not_known_takes_the_least():
    assert ahead._advice_bytes.__wrapped__(2**40) == 2**17


def test_garbage_waits_for_the_block_and_is_collected_afterwards(fetched, models):
    with reading_ahead(*models):
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), reading_ahead(*models):
        raise KeyError("of the block")
    assert gc.isenabled()
