import json

import pytest

from extend.documents import list_files, read_documents, read_json_lines
from extend.errors import DataError


def test_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth"}\n')
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert list(read_documents(tmp_path)) == ["first", "second", "third", "fourth"]
    assert [p.name for p in list_files(tmp_path)] == ["a.md", "one.txt", "c.jsonl"]


def test_parquet_rows_are_documents(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet is an optional extra")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"body": ["eins", "zwei"], "n": [1, 2]}), tmp_path / "x.parquet")
    assert list(read_documents(tmp_path / "x.parquet", column="body")) == ["eins", "zwei"]
    with pytest.raises(DataError, match="no column 'text'; it has body, n"):
        list(read_documents(tmp_path / "x.parquet"))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("x.txt", b"ok \xff", "not UTF-8 at byte 3"),
    ("x.jsonl", b'{"text": "a"}\n{"text"\n', "x.jsonl:2: not valid JSON"),
    ("x.jsonl", b"[1, 2]\n", "x.jsonl:1: a JSON list, not an object"),
    ("x.jsonl", b'{"body": "a"}\n', "no text under 'text'; it has body"),
    ("x.bin", b"a", "unknown kind of file"),
])
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents(tmp_path / name))


def test_missing_and_empty_paths_differ(tmp_path):
    with pytest.raises(DataError, match="no such file or directory"):
        list_files(tmp_path / "none")
    with pytest.raises(DataError, match="holds no text"):
        list_files(tmp_path)


def test_json_lines_say_where_they_are(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(read_json_lines(tmp_path / "x.jsonl"))
    assert found == [(f"{tmp_path / 'x.jsonl'}:1", rows[0]), (f"{tmp_path / 'x.jsonl'}:2", rows[1])]
