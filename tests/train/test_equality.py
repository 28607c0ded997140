"""What several processes hold alike is compared, and nothing else is."""

import sys

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from extend.errors import TrainingError
from extend.train.equality import check_equal, hash_tensor
from extend.train.mesh import Processes
from tests.spawn import spawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
def test_one_bit_changes_the_hash(dtype: torch.dtype):
    torch.manual_seed(0)
    tensor = (100 * torch.rand(3, 5)).to(dtype)
    seen = {hash_tensor(tensor)}
    for place in range(tensor.numel()):
        for bit in range(8 * tensor.element_size()):
            data = bytearray(tensor.flatten().view(torch.uint8).numpy().tobytes())
            data[place * tensor.element_size() + bit // 8] ^= 1 << bit % 8
            seen.add(hash_tensor(torch.frombuffer(data, dtype=dtype).view(3, 5)))
    assert len(seen) == 1 + tensor.numel() * tensor.element_size() * 8
    assert hash_tensor(tensor.clone()) in seen and hash_tensor(tensor.flip(0)) not in seen


def test_chunks_do_not_change_the_hash(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.randn(1000)
    whole = hash_tensor(tensor)
    monkeypatch.setattr(sys.modules[hash_tensor.__module__], "_CHUNK", 7)
    assert hash_tensor(tensor) == whole


def compare(rank: int, world: int) -> list[str]:
    """Messages for: equal tensors; a replica that differs; plain tensors that differ."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    flat = init_device_mesh("cpu", (world,))
    processes = Processes(rank, world, torch.device("cpu"), flat)

    def deal() -> dict[str, Tensor]:
        torch.manual_seed(0)
        return {
            "plain": torch.randn(3),
            "sharded": distribute_tensor(torch.randn(8, 2), flat, [Shard(0)]),
            "both": distribute_tensor(torch.randn(6, 2), mesh, [Replicate(), Shard(0)]),
            # Fewer rows than processes: two of them hold nothing.
            "short": distribute_tensor(torch.randn(2, 2), flat, [Shard(0)])}

    def change(name: str, guilty: int) -> dict[str, Tensor]:
        tensors = deal()
        if rank == guilty:
            local = tensors[name]
            local = local.to_local() if hasattr(local, "to_local") else local
            local.view(torch.int32)[-1] += 1  # the lowest bit of an element
        return tensors

    messages = []
    for tensors in (deal(), change("sharded", 2), change("both", 3), change("plain", 1)):
        try:
            check_equal(tensors, processes)
            messages.append("")
        except TrainingError as error:
            messages.append(str(error))
    return messages


def test_replicas_are_compared_and_shards_are_not():
    """2 x 2 processes; ranks 1 and 3 hold the second half of what is replicated and sharded."""
    for equal, sharded, both, plain in spawn(4, compare):
        assert equal == sharded == ""
        assert both.startswith("both must be the same in processes 1 and 3")
        assert plain.startswith("plain must be the same in processes 0 and 1")
        assert "Go on from the last checkpoint" in plain
