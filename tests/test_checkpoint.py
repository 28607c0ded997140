"""Files written here are read by safetensors itself, and damaged ones are refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from extend.checkpoint import (
    DTYPE_BYTES,
    Checkpoint,
    TensorInfo,
    dtype_name,
    read_header,
    torch_dtype,
    write_checkpoint,
    write_safetensors,
)
from extend.errors import CheckpointError

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, torch.Tensor]:
    """Every storable kind: dtypes, a scalar, an empty tensor, a view that is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator)
    return {"fp32": weight, "bf16": weight.bfloat16(), "fp16": weight.half(),
            "fp64": weight.double(), "int64": torch.arange(7), "bool": weight > 0,
            "int8": torch.arange(3, dtype=torch.int8), "uint8": torch.arange(5, dtype=torch.uint8),
            "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "view": weight.T[1:3],
            "fp8": weight.to(torch.float8_e4m3fn), "nan": torch.tensor([float("nan"), -0.0])}


def infos_of(data: dict[str, torch.Tensor]) -> list[TensorInfo]:
    return [TensorInfo(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in data.items()]


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (found, expected)))


def build(path: Path, header: object, body: int) -> Path:
    """A safetensors file with any header and `body` zero bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(body))
    return path


def entry(begin: object, end: object, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- round trips ---

@pytest.mark.parametrize("max_shard_bytes", [10**9, 200, 1])
def test_written_checkpoints_are_read_by_safetensors(max_shard_bytes, tmp_path):
    data = tensors()
    write_checkpoint(tmp_path, infos_of(data), data.__getitem__, max_shard_bytes=max_shard_bytes)
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        found.update(load_file(file))
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert set(found) == set(data)
    for name, tensor in data.items():
        same_bits(found[name], tensor)
    assert (tmp_path / INDEX).exists() == (max_shard_bytes < 10**9)
    assert (tmp_path / FILE).exists() == (max_shard_bytes == 10**9)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == sorted(data)
    assert checkpoint.num_bytes == sum(t.numel() * t.element_size() for t in data.values())
    for name, tensor in data.items():
        same_bits(checkpoint.read(name), tensor)


def test_shards_respect_the_limit_and_the_index_is_right(tmp_path):
    data = {f"w{i}": torch.full((10,), float(i)) for i in range(7)}
    write_checkpoint(tmp_path, infos_of(data), data.__getitem__, max_shard_bytes=100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 280}
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], data[name])


def test_files_of_safetensors_are_read(tmp_path):
    data = {n: t.contiguous() for n, t in tensors().items()}
    save_file(data, tmp_path / FILE)
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in data.items():
        same_bits(checkpoint.read(name), tensor)
        assert checkpoint.infos[name].shape == tuple(tensor.shape)
    assert checkpoint.files == [tmp_path / FILE]


def test_body_starts_aligned(tmp_path):
    for name in ("a", "ab", "abc", "abcd", "abcde"):
        write_safetensors(tmp_path / FILE, infos_of({name: torch.zeros(1)}),
                          lambda _: torch.zeros(1))
        length = struct.unpack("<Q", (tmp_path / FILE).read_bytes()[:8])[0]
        assert length % 8 == 0


def test_only_one_tensor_is_asked_for_at_a_time(tmp_path):
    order = []

    def read(name: str) -> torch.Tensor:
        order.append(name)
        return torch.zeros(4)

    infos = [TensorInfo(n, "F32", (4,)) for n in "cab"]
    write_checkpoint(tmp_path, infos, read, max_shard_bytes=32)
    assert order == ["c", "a", "b"]


def test_a_tensor_other_than_announced_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"'w' was announced as F32 \(2,\) but is .*float16"):
        write_safetensors(tmp_path / FILE, [TensorInfo("w", "F32", (2,))],
                          lambda _: torch.zeros(2, dtype=torch.float16))
    with pytest.raises(CheckpointError, match=r"announced as F32 \(2,\)"):
        write_safetensors(tmp_path / FILE, [TensorInfo("w", "F32", (2,))], lambda _: torch.zeros(3))


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_blocks_of_rows_make_up_a_tensor(rows, tmp_path):
    data = {"w": torch.randn(5, 3), "v": torch.randn(5).half(), "s": torch.tensor(2.0)}
    write_safetensors(tmp_path / FILE, infos_of(data), lambda name: iter(
        data[name].split(rows) if data[name].dim() else [data[name]]))
    for name, value in load_file(tmp_path / FILE).items():
        assert value.dtype == data[name].dtype
        assert torch.equal(value, data[name])


@pytest.mark.parametrize(("blocks", "message"), [
    ([torch.zeros(2, 3)], r"F32 \(5, 3\) but came with 2 rows"), ([], "came with 0 rows"),
    ([torch.zeros(5, 3), torch.zeros(1, 3)], "came with 6 rows"),
    ([torch.zeros(5, 2)], r"F32 \(5, 3\) but is torch.float32 \(5, 2\)"),
    ([torch.zeros(5, 3).half()], r"F32 \(5, 3\) but is torch.float16")])
def test_blocks_that_make_up_another_tensor_are_refused(blocks, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        write_safetensors(tmp_path / FILE, [TensorInfo("w", "F32", (5, 3))], lambda _: iter(blocks))


def test_dtype_names():
    for name in DTYPE_BYTES:
        if name not in ("U16", "U32", "U64"):
            assert dtype_name(torch_dtype(name)) == name
            assert torch_dtype(name).itemsize == DTYPE_BYTES[name]
    with pytest.raises(CheckpointError, match="complex64"):
        dtype_name(torch.complex64)


# --- damaged files ---

@pytest.mark.parametrize(("header", "body", "message"), [
    ({"w": entry(0, 8)}, 7, "describes 8 bytes of tensors but the file holds 7"),
    ({"w": entry(0, 8)}, 9, "describes 8 bytes of tensors but the file holds 9"),
    ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "overlap or leave a gap at byte 8"),
    ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlap or leave a gap at byte 8"),
    ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlap or leave a gap at byte 8"),
    ({"w": entry(0, 4)}, 4, "tensor 'w' is not consistent"),
    ({"w": entry(0, 8, shape=(-2,))}, 8, "tensor 'w' is not consistent"),
    ({"w": entry(0, 8, shape=(-2, -1))}, 8, "tensor 'w' is not consistent"),
    ({"w": entry(-8, 0)}, 8, "tensor 'w' is not consistent"),
    ({"w": entry("0", "8")}, 8, "tensor 'w' is not consistent"),
    ({"w": entry(0, 8, dtype="F99")}, 8, "tensor 'w' is not consistent"),
    ({"w": entry(0, 8, dtype=["F32"])}, 8, "tensor 'w' is not consistent"),
    ({"w": {"dtype": "F32"}}, 8, "tensor 'w' is not consistent"),
    ({"w": 3}, 8, "tensor 'w' is not consistent"),
    ([1, 2], 0, "damaged safetensors header"),
    (b"{not json", 0, "damaged safetensors header"),
    (b"\xff\xff\xff\xff", 0, "damaged safetensors header"),
    (b"[" * 100_000, 0, "damaged safetensors header"),
])
def test_damaged_headers(header, body, message, tmp_path):
    path = build(tmp_path / FILE, header, body)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 0) + b"{}",
                                     struct.pack("<Q", 2**63), struct.pack("<Q", 50) + b"{}",
                                     b"version https://git-lfs.github.com/spec/v1\n"])
def test_files_that_are_not_safetensors(content, tmp_path):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(tmp_path / FILE)


def test_every_truncation_is_found(tmp_path):
    data = {"a": torch.arange(5.0), "b": torch.arange(3)}
    save_file(data, tmp_path / FILE)
    whole = (tmp_path / FILE).read_bytes()
    for size in range(len(whole)):
        (tmp_path / FILE).write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            Checkpoint(tmp_path)


# --- directories ---

@pytest.fixture
def sharded(tmp_path) -> Path:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_by_index(sharded):
    assert Checkpoint(sharded).names == ["a", "b"]
    assert torch.equal(Checkpoint(sharded).read("b"), torch.ones(3))


@pytest.mark.parametrize(("weight_map", "message"), [
    ({"a": "one.safetensors"}, None),
    ({"a": "two.safetensors", "b": "two.safetensors"}, "'a' in two.safetensors, but it is in no"),
    ({"a": "one.safetensors", "b": "one.safetensors"}, "'b' in one.safetensors, but it is in no"),
    ({"a": "two.safetensors", "b": "one.safetensors"}, "but it is in one.safetensors"),
    ({"a": "one.safetensors", "b": "six.safetensors"}, "six.safetensors: no such file"),
    ({"a": "../one.safetensors"}, "is not a file name in this directory"),
    ({"a": 3}, "3 is not a file name"),
    ({}, "holds no weight_map"),
    (["one.safetensors"], "holds no weight_map"),
    (None, "holds no weight_map"),
])
def test_index_that_does_not_match(weight_map, message, sharded):
    write_index(sharded, weight_map)
    if message is None:  # a shard may lie there unused, as long as nothing in a used one is
        assert Checkpoint(sharded).names == ["a"]
        return
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(sharded)


def test_tensor_that_the_index_forgot(sharded):
    save_file({"b": torch.ones(3), "c": torch.ones(1)}, sharded / "two.safetensors")
    with pytest.raises(CheckpointError, match="hold 'c', which the index does not list"):
        Checkpoint(sharded)


def test_tensor_in_two_shards(sharded):
    save_file({"b": torch.ones(3), "a": torch.ones(2)}, sharded / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in both one\.safetensors and two"):
        Checkpoint(sharded)


def test_every_damaged_shard_and_every_misplaced_tensor_is_named(sharded):
    write_index(sharded, {"a": "gone.safetensors", "b": "two.safetensors", "c": "lost.safetensors"})
    (sharded / "two.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(sharded)
    for part in ("gone.safetensors: no such file", "lost.safetensors: no such file",
                 "two.safetensors: not a safetensors file"):
        assert str(caught.value).count(part) == 1
    save_file({"b": torch.ones(3)}, sharded / "two.safetensors")
    write_index(sharded, {"b": "two.safetensors",
                          **{f"x{i}": "two.safetensors" for i in range(10)}})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(sharded)
    assert str(caught.value).count("but it is in no shard") == 8
    assert str(caught.value).endswith("and 2 problems more")


@pytest.mark.parametrize("file_of", [
    {"a": "x.safetensors", "b": "y.safetensors", "c": "x.safetensors"},
    {"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"},
    {"a": FILE, "b": FILE, "c": FILE}], ids=["two", "one", "single"])
def test_sharded_like_another(file_of, tmp_path):
    data = {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.float16), "c": torch.ones(1, 2)}
    write_checkpoint(tmp_path, infos_of(data), data.__getitem__, max_shard_bytes=1, file_of=file_of)
    assert {f.name for f in tmp_path.glob("*.safetensors")} == set(file_of.values())
    for file in set(file_of.values()):
        stored = load_file(tmp_path / file)
        assert set(stored) == {name for name in file_of if file_of[name] == file}
        for name, value in stored.items():
            assert value.dtype == data[name].dtype
            assert torch.equal(value, data[name])
    assert (tmp_path / INDEX).exists() == (FILE not in file_of.values())
    if (tmp_path / INDEX).exists():
        assert json.loads((tmp_path / INDEX).read_text()) == {
            "metadata": {"total_size": 8 + 6 + 8}, "weight_map": file_of}
    assert Checkpoint(tmp_path).file_of == file_of


def test_directories_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="absent: no such directory"):
        Checkpoint(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="only safetensors weights are read"):
        Checkpoint(tmp_path)


def test_unknown_tensor(sharded):
    with pytest.raises(CheckpointError, match="holds no tensor 'z'"):
        Checkpoint(sharded).read("z")


@pytest.mark.parametrize(("max_shard_bytes", "why"), [
    (40, "model.safetensors.index.json does not list it"),
    (10**9, "a model without an index does not list it")])
def test_a_shard_that_is_not_listed_is_named_and_not_read(tmp_path, caplog, max_shard_bytes, why):
    """As of an earlier save, or the same weights under another scheme of names."""
    data = {"a": torch.ones(10), "b": torch.zeros(10)}
    write_checkpoint(tmp_path, infos_of(data), data.__getitem__, max_shard_bytes=max_shard_bytes)
    Checkpoint(tmp_path)
    assert not caplog.records
    save_file({"a": torch.full((10,), 7.0), "old": torch.ones(1)},
              tmp_path / "consolidated.safetensors")
    found = Checkpoint(tmp_path)
    assert found.names == ["a", "b"]
    same_bits(found.read("a"), data["a"])
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (f"{tmp_path}: consolidated.safetensors is not read, because "
                                   f"{why}; delete what is left of another save")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_elements_at_places(tmp_path, dtype):
    whole = torch.arange(7 * 5).reshape(7, 5).to(dtype)
    save_file({"a": torch.zeros(3), "w": whole}, tmp_path / "model.safetensors")
    index = torch.tensor([34, 0, 8, 8, 17])
    found = Checkpoint(tmp_path).stored("w").take(index)
    torch.testing.assert_close(found, whole.reshape(-1)[index], rtol=0, atol=0)


def test_elements_behind_the_end_are_refused(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="'w' cannot be read .the file ends too early"):
        Checkpoint(tmp_path).stored("w").take(torch.tensor([3]))


def test_one_row_of_a_stored_tensor_and_a_buffer_for_it(tmp_path):
    whole = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"a": torch.ones(7, dtype=torch.uint8), "w": whole}, tmp_path / "model.safetensors")
    stored = Checkpoint(tmp_path).stored("w")
    stored.fetch()
    buffer = torch.zeros(100, dtype=torch.uint8)
    for row in range(3):
        part = stored.part(row)
        assert part.info.shape == (4, 5)
        assert torch.equal(part.read(), whole[row])
        found = part.read(slice(1, 4), into=buffer)
        assert torch.equal(found, whole[row, 1:4])
        assert found.data_ptr() == buffer.data_ptr()
