"""Weights read into shards against transformers' own loading, to the bit."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from extend.checkpoint import Checkpoint, StoredTensor
from extend.errors import CompatibilityError
from extend.model_config import read_config
from extend.train import weights
from extend.train.gather import gather
from extend.train.mesh import Processes
from extend.train.model import build_model, load_model
from extend.train.weights import fill_weights, place_module
from extend.train_options import TrainOptions
from tests.train.tiny import options

SIZES = {"vocab_size": 66, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=16,
                               layer_types=["sliding_attention", "full_attention"]),
    "mistral": MistralConfig(**SIZES, sliding_window=16),
}


def save(config: PretrainedConfig, directory: Path) -> Path:
    """A model in which no parameter has the value that it is made with."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(directory)
    return directory


def run_options(directory: Path, **changes: object) -> TrainOptions:
    return options(directory, [{"kind": "retrieval"}], **changes)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(FAMILIES["llama"], tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_from_pretrained(family: str, dtype: str, tmp_path: Path):
    save(FAMILIES[family], tmp_path)
    got = load_model(run_options(tmp_path, weight_dtype=dtype), read_config(tmp_path))
    want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    assert any("inv_freq" in name for name in tensors(want))
    torch.testing.assert_close(tensors(got), tensors(want), rtol=0, atol=0)
    tied = want.lm_head.weight is want.model.embed_tokens.weight
    assert (got.lm_head.weight is got.model.embed_tokens.weight) == tied


def test_nothing_is_read_before_it_has_a_place(llama: Path, monkeypatch: pytest.MonkeyPatch):
    """Also not for adapters."""
    monkeypatch.setattr(StoredTensor, "read", lambda *_, **__: pytest.fail("read"))
    for mode in ("full", "lora"):
        model = build_model(run_options(llama, mode=mode), read_config(llama))
        assert all(p.is_meta for p in model.parameters())
        assert not any(b.is_meta for b in model.buffers())


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_the_file_holds_too(same: bool, tmp_path: Path):
    """transformers ties it where both are equal."""
    save(FAMILIES["llama-tied"], tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    embeddings = held["model.embed_tokens.weight"]
    head = embeddings.clone() if same else embeddings + 1
    save_file(held | {"lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    got = load_model(run_options(tmp_path), read_config(tmp_path))
    want = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(tensors(got), tensors(want), rtol=0, atol=0)
    assert (got.lm_head.weight is got.model.embed_tokens.weight) == same
    assert (want.lm_head.weight is want.model.embed_tokens.weight) == same


def test_a_tied_weight_under_its_second_name(tmp_path: Path):
    save(FAMILIES["llama-tied"], tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["lm_head.weight"] = held.pop("model.embed_tokens.weight")
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    got = load_model(run_options(tmp_path), read_config(tmp_path))
    torch.testing.assert_close(got.model.embed_tokens.weight, held["lm_head.weight"],
                               rtol=0, atol=0, check_stride=False)


def test_large_tensors_come_in_blocks(llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "_BLOCK_BYTES", 1000)
    got = load_model(run_options(llama), read_config(llama))
    want = AutoModelForCausalLM.from_pretrained(llama)
    torch.testing.assert_close(tensors(got), tensors(want), rtol=0, atol=0)


def test_adapters_start_as_peft_starts_them(llama: Path):
    """The same distribution: A uniform within the same bounds, B zero."""
    model = load_model(run_options(llama, mode="lora", lora_rank=8), read_config(llama))
    twin = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(
        r=8, lora_alpha=8, target_modules="all-linear")).base_model.model
    found = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    assert found.keys() == {n for n, _ in twin.named_parameters() if ".lora_" in n}
    for name, parameter in found.items():
        if ".lora_B." in name:
            assert not parameter.any()
            continue
        bound = twin.get_parameter(name).shape[1] ** -0.5  # kaiming with a = sqrt(5)
        for values in (parameter, twin.get_parameter(name)):
            assert 0.9 * bound < values.abs().max() <= bound
            assert values.mean().abs() < 5 * bound / (3 * values.numel()) ** 0.5


def test_what_cannot_be_made_without_weights_is_refused(llama: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(llama, tmp_path / "model")
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    config = read_config(tmp_path / "model")
    with pytest.raises(CompatibilityError, match=r"input_layernorm.weight of .*in bfloat16"):
        build_model(run_options(tmp_path / "model", weight_dtype="bfloat16"), config)
    build_model(run_options(tmp_path / "model"), config)


def shard_2d(model: nn.Module, layout: str) -> None:
    """FSDP over tensor parallel, replicas of shards, or shards that do not divide."""
    if layout == "flat":
        mesh = init_device_mesh("cpu", (4,))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"self_attn.q_proj": ColwiseParallel(), "self_attn.o_proj": RowwiseParallel(),
            "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        if layout == "tensor":
            parallelize_module(layer, mesh["tp"], plan)
        fully_shard(layer, mesh=mesh["dp"] if layout == "tensor" else mesh)
    fully_shard(model, mesh=mesh["dp"] if layout == "tensor" else mesh)


LAYOUTS = {"tensor": "llama", "replicas": "llama-tied", "flat": "llama-tied"}


def refuse_interleaved(directory: Path) -> str:
    """66 rows over two tensor-parallel processes and two shards of each."""
    model = build_model(run_options(directory), read_config(directory))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    place_module(model, torch.device("cpu"))
    with pytest.raises(CompatibilityError) as caught:
        fill_weights(model, Checkpoint(directory))
    return str(caught.value)


def fill_shards(rank: int, world: int, directories: dict[str, Path]) -> tuple[list[dict], str]:
    """Of every layout: parameters as torch gathers them, as we do, and the placements."""
    found = []
    processes = Processes(rank, world, torch.device("cpu"), init_device_mesh("cpu", (world,)))
    for layout, family in LAYOUTS.items():
        directory = directories[family]
        model = build_model(run_options(directory), read_config(directory))
        shard_2d(model, layout)
        place_module(model, torch.device("cpu"))
        fill_weights(model, Checkpoint(directory))
        parameters = dict(model.named_parameters())
        assert all(isinstance(p, DTensor) for p in parameters.values())
        found.append({
            "tied": model.lm_head.weight is model.model.embed_tokens.weight,
            "torch": {n: p.full_tensor().detach() for n, p in parameters.items()},
            "ours": {n: gather(p, torch.bfloat16, processes) for n, p in parameters.items()},
            "buffers": dict(model.named_buffers()),
            "numel": sum(p.to_local().numel() for p in parameters.values())})
    return found, refuse_interleaved(directories["llama"])


def assert_shards(directories: dict[str, Path], ranks: list[tuple[list[dict], str]]) -> None:
    """Check what `fill_shards` found against the whole model in one process."""
    for number, (layout, family) in enumerate(LAYOUTS.items()):
        alone = load_model(run_options(directories[family]), read_config(directories[family]))
        want = {name: p.detach() for name, p in alone.named_parameters()}
        whole = sum(p.numel() for p in want.values())
        for rank, (results, refused) in enumerate(ranks):
            assert refused.startswith("a weight of shape (66, 32) does not divide over 4 processes")
            got = results[number]
            torch.testing.assert_close(got["torch"], want, rtol=0, atol=0)
            torch.testing.assert_close(got["buffers"], dict(alone.named_buffers()), rtol=0, atol=0)
            assert got["tied"] == (family == "llama-tied")
            assert got["numel"] < whole * (0.6 if layout != "flat" else 0.3)
            if rank == 0:
                cast = {name: p.bfloat16() for name, p in want.items()}
                torch.testing.assert_close(got["ours"], cast, rtol=0, atol=0)
            else:
                assert set(got["ours"].values()) == {None}
