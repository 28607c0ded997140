import pytest

from extend.errors import CheckpointError
from extend.evaluate.rows import RowStore

IDENTITY = {"seed": 0, "options": {"cells": ("a", "b")}}


def test_rows_of_all_processes_come_back(tmp_path):
    store = RowStore.open(tmp_path / "rows", IDENTITY)
    store.append(0, "a", {"score": 1.0})
    store.append(1, "b", {"score": 0.5, "name": "\u2028 |"})
    expected = {"a": {"score": 1.0}, "b": {"score": 0.5, "name": "\u2028 |"}}
    assert store.read() == expected
    again = RowStore.open(tmp_path / "rows", IDENTITY)
    assert again.read() == expected
    again.append(0, "c", {})
    assert set(again.read()) == {"a", "b", "c"}
    again.remove()
    assert not (tmp_path / "rows").exists()


def test_torn_last_line_is_dropped(tmp_path):
    store = RowStore.open(tmp_path / "rows", IDENTITY)
    store.append(0, "a", {"n": 1})
    with (tmp_path / "rows" / "rows-0.jsonl").open("a") as file:
        file.write('{"cell": "b", "row": {"n"')
    again = RowStore.open(tmp_path / "rows", IDENTITY)
    assert again.read() == {"a": {"n": 1}}
    again.append(0, "b", {"n": 2})
    assert again.read() == {"a": {"n": 1}, "b": {"n": 2}}


@pytest.mark.parametrize("torn", [
    b"", b"\n", b'{"cell": "x", "row": {"name": "\xe2\x80', b'{"cell": "x"}', b'["x"]', b'{"cell"',
    b"\x00\x00"], ids=["empty", "blank", "half a letter", "no row", "list", "half", "zeros"])
def test_torn_last_lines_of_several_files_cost_their_rows_alone(tmp_path, torn):
    store = RowStore.open(tmp_path / "rows", IDENTITY)
    for rank in range(3):
        store.append(rank, f"cell {rank}", {"name": "\u00e9", "rank": rank})
    expected = {f"cell {rank}": {"name": "\u00e9", "rank": rank} for rank in range(3)}
    for name in ("rows-0", "rows-1", "rows-9"):  # a process that had written nothing yet, too
        with (tmp_path / "rows" / f"{name}.jsonl").open("ab") as file:
            file.write(torn)
    assert store.read() == expected
    again = RowStore.open(tmp_path / "rows", IDENTITY)
    assert again.read() == expected
    again.append(1, "x", {"done": True})
    assert RowStore.open(tmp_path / "rows", IDENTITY).read() == {**expected, "x": {"done": True}}


def test_damage_in_the_middle_is_an_error(tmp_path):
    store = RowStore.open(tmp_path / "rows", IDENTITY)
    (tmp_path / "rows" / "rows-0.jsonl").write_text('{"cell"\n{"cell": "b", "row": {}}\n')
    with pytest.raises(CheckpointError, match=r"rows-0\.jsonl:1: damaged"):
        store.read()


def test_rows_of_another_evaluation_are_not_taken_up(tmp_path):
    RowStore.open(tmp_path / "rows", IDENTITY).append(0, "a", {})
    assert RowStore.open(tmp_path / "rows", {**IDENTITY, "seed": 1}).read() == {}
    (tmp_path / "rows" / "run.json").write_text("{")
    assert RowStore.open(tmp_path / "rows", IDENTITY).read() == {}
