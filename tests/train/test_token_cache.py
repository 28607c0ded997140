"""Tokens on disk: written once and whole, the same as without, found again, damage noticed."""

import errno
import fcntl
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from extend import encoding
from extend.errors import CheckpointError, DataError, TrainingError
from extend.manifest import hash_content
from extend.train import text, token_cache
from extend.train.data import Rows, load_rows
from extend.train.text import TokenSource
from extend.train.token_cache import TokenCache, TokenWriter, default_directory
from extend.train_options import TrainOptions
from tests.train.tiny import save_examples, save_text, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {"text": str(save_text(tmp_path / "data")),
            "examples": str(save_examples(tmp_path / "data"))}


def open_cache(directory: Path, files: dict[str, str], **changes: object) -> TokenCache:
    return TokenCache([directory], {path: hash_content(path) for path in files.values()}, **changes)


def read(cache: TokenCache, tokenizer, files: dict[str, str]) -> text.Documents:
    return TokenSource(tokenizer, cache).text(files["text"], "text")


def load(tokenizer, files: dict[str, str], cache: TokenCache | None) -> Rows:
    data = [{"kind": "text", "path": files["text"]},
            {"kind": "examples", "path": files["examples"]},
            {"kind": "retrieval", "path": files["text"]}]
    options = TrainOptions(model="m", data=data, schedule=[
        {"length": 256, "steps": 12, "lr": 1e-4}])
    return load_rows(options, tokenizer, cache)


def forbid_tokenizing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("tokenised although the cache has it")

    monkeypatch.setattr(TokenWriter, "add", refuse)


def test_rows_are_the_same_without_a_cache_with_one_and_at_the_second_start(
        tokenizer, files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without = load(tokenizer, files, None)
    first = load(tokenizer, files, open_cache(tmp_path / "cache", files))
    forbid_tokenizing(monkeypatch)
    second = load(tokenizer, files, open_cache(tmp_path / "cache", files))
    for index in (7, 0, 11, 3, 4, 5):  # from any step, in any order
        rows = [rows.row(0, index) for rows in (without, first, second)]
        for name in ("input_ids", "labels", "answers", "cu_seqlens"):
            for row in rows[1:]:
                np.testing.assert_array_equal(getattr(row, name), getattr(rows[0], name))


def test_documents_are_mapped_and_cannot_be_written(tokenizer, files, tmp_path: Path):
    documents = read(open_cache(tmp_path / "cache", files), tokenizer, files)
    assert isinstance(documents.ids, np.memmap) and documents.ids.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        documents.ids[0] = 1
    lines = [json.loads(line)["text"] for line in Path(files["text"]).read_text().splitlines()]
    assert tokenizer.decode(documents.ids) == "".join(lines)
    assert np.diff(documents.offsets).tolist() == [len(line) for line in lines]


def flip(entry: Path) -> None:
    ids = np.memmap(entry / "ids.bin", dtype=np.int32, mode="r+")
    ids[len(ids) // 2] ^= 1


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip,
    "a shortened file": lambda entry: (entry / "ids.bin").write_bytes(b"1234"),
    "a lost file": lambda entry: (entry / "offsets.bin").unlink(),
    "no record": lambda entry: (entry / "meta.json").unlink(),
    "half a record": lambda entry: (entry / "meta.json").write_text('{"format": 1, "fil'),
    "another format": lambda entry: (entry / "meta.json").write_text('{"format": 0, "files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again(damage: str, tokenizer, files, tmp_path: Path,
                                       caplog: pytest.LogCaptureFixture):
    cache = open_cache(tmp_path / "cache", files)
    want = np.array(read(cache, tokenizer, files).ids)
    [entry] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    DAMAGE[damage](entry)
    np.testing.assert_array_equal(read(cache, tokenizer, files).ids, want)
    assert f"{entry}: is damaged, and made again" in caplog.text
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [entry]
    assert token_cache.read_entry(entry, "again") is not None


def test_whatever_decides_the_ids_decides_the_entry(tokenizer, files, tmp_path: Path):
    def count() -> int:
        return sum(path.is_dir() for path in (tmp_path / "cache").iterdir())

    read(open_cache(tmp_path / "cache", files), tokenizer, files)
    read(open_cache(tmp_path / "cache", files), tokenizer, files)
    moved = {"text": shutil.copy(files["text"], tmp_path / "moved.jsonl")}
    read(open_cache(tmp_path / "cache", moved), tokenizer, moved)
    assert count() == 1  # by its content, wherever it lies
    other = save_tokenizer(tmp_path / "other")
    other.add_tokens(["Line"])
    read(open_cache(tmp_path / "cache", files), other, files)
    assert count() == 2
    row = {"text": "a", "body": "b"}
    Path(files["text"]).write_text(json.dumps(row) + "\n")
    read(open_cache(tmp_path / "cache", files), tokenizer, files)
    found = TokenSource(tokenizer, open_cache(tmp_path / "cache", files)).text(files["text"],
                                                                               "body")
    assert count() == 4 and tokenizer.decode(found.ids) == "b\n"


def test_many_at_once_tokenise_once(tmp_path: Path):
    made = []

    def build(writer: TokenWriter) -> None:
        made.append(threading.get_ident())
        for _ in range(50):
            writer.add(np.arange(100))

    def get(_: int) -> int:
        cache = TokenCache([tmp_path / "cache"], {"path": "hash"}, patience=0.01)
        return int(cache.get("path", [], build).ids.sum())

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(get, range(6))) == {50 * 4950}
    assert len(made) == 1


def test_without_locks_the_first_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache = TokenCache([tmp_path], {"path": "hash"})

    def build(writer: TokenWriter) -> None:
        writer.add(np.arange(3))

    def build_slowly(writer: TokenWriter) -> None:
        cache.get("path", [], build)  # another process that is faster
        writer.add(np.arange(3))

    assert cache.get("path", [], build_slowly).ids.tolist() == [0, 1, 2]
    assert sum(path.is_dir() for path in tmp_path.iterdir()) == 1


def test_who_is_stopped_leaves_nothing(tokenizer, files, tmp_path: Path):
    cache = open_cache(tmp_path / "cache", files)
    cache.stopped.set()
    with pytest.raises(TrainingError, match="the run ends"):
        read(cache, tokenizer, files)
    assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())
    [lock] = (tmp_path / "cache").iterdir()
    with lock.open("w") as held:  # another process is at work
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match="waiting for tokens"):
            read(cache, tokenizer, files)


def test_files_that_differ_between_hosts_are_refused(tokenizer, files, tmp_path: Path):
    cache = open_cache(tmp_path / "cache", files)  # as the main process hashed them
    with Path(files["text"]).open("a") as file:
        file.write('{"text": "another host has more"}\n')
    with pytest.raises(DataError, match="give all hosts the same files"):
        read(cache, tokenizer, files)


def test_bad_text_leaves_nothing(tokenizer, files, tmp_path: Path):
    with Path(files["text"]).open("a") as file:
        file.write('{"title": "no text"}\n')
    with pytest.raises(DataError, match=r"text.jsonl:41: no text under 'text'"):
        read(open_cache(tmp_path / "cache", files), tokenizer, files)
    assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())


def refuse_writing(directory: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a disk that is mounted to be read only does; tests may run as a user who may anything."""
    real = Path.open

    def refuse(path: Path, mode: str = "r", *args: object, **more: object):
        if "w" in mode and path.is_relative_to(directory):
            raise OSError(code, "refused", str(path))
        return real(path, mode, *args, **more)

    monkeypatch.setattr(Path, "open", refuse)


def test_a_cache_that_cannot_be_written_is_read_and_another_written(
        tokenizer, files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture):
    full, empty, own = tmp_path / "full", tmp_path / "empty", tmp_path / "own"
    read(open_cache(full, files), tokenizer, files)
    refuse_writing(full, errno.EROFS, monkeypatch)
    refuse_writing(empty, errno.EROFS, monkeypatch)
    cache = open_cache(full, files, is_main=True)
    assert len(read(cache, tokenizer, files).ids)
    cache.directories = [empty, own]
    assert len(read(cache, tokenizer, files).ids)
    assert not any(empty.iterdir()) and any(path.is_dir() for path in own.iterdir())
    assert f"{empty}: tokens cannot be written there (refused); set token_cache" in caplog.text
    cache.directories = [empty]
    with pytest.raises(CheckpointError, match="set token_cache to a directory with room"):
        read(cache, tokenizer, files)


def test_a_full_disk_is_told(tokenizer, files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    refuse_writing(tmp_path / "cache", errno.ENOSPC, monkeypatch)
    with pytest.raises(CheckpointError, match="tokens cannot be written there"):
        read(open_cache(tmp_path / "cache", files), tokenizer, files)


def test_empty_documents_are_left_out_and_told(tokenizer, tmp_path: Path,
                                               caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", "one", " \n", "2")))
    documents = read(open_cache(tmp_path / "cache", {"text": str(path)}), tokenizer,
                     {"text": str(path)})
    assert tokenizer.decode(documents.ids) == "one\n2\n" and documents.offsets.tolist() == [0, 4, 6]
    assert "2 documents, 2 empty ones left out, 6 tokens" in caplog.text


def test_text_is_read_as_it_is_needed(tokenizer):
    read_so_far = []

    def texts():
        for number in range(100):
            read_so_far.append(number)
            yield f"text {number}"

    ids = encoding.encode_documents(tokenizer, texts(), "here", "a test", batch_chars=10)
    assert tokenizer.decode(next(ids)) == "text 0\n"
    assert len(read_so_far) <= 2 * 3
    assert [tokenizer.decode(one) for one in ids] == [f"text {n}\n" for n in range(1, 100)]


@pytest.mark.parametrize(("variables", "want"), [
    ({"EXTEND_CACHE": "/big"}, "/big/tokens"),
    ({"EXTEND_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/extend/tokens"),
    ({"EXTEND_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/me"}, "/me/.cache/extend/tokens"),
])
def test_the_cache_is_where_the_user_keeps_caches(variables: dict[str, str], want: str,
                                                  monkeypatch: pytest.MonkeyPatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_directory() == Path(want)
