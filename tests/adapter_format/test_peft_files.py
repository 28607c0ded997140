"""The adapter directory: PEFT reads what we write, and we read what PEFT writes, or say why not."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from extend.adapter_format.peft_files import (
    Adapter,
    LoraModule,
    header_bytes,
    shorten,
    stream_adapter,
    write_adapter,
)
from extend.errors import CheckpointError, CompatibilityError
from tests.adapter_format.tiny_models import build, edit_json, save

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj",
           "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
RANKS = {MODULES[0]: 6, MODULES[1]: 3, MODULES[2]: 6, MODULES[3]: 2}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save(build("llama"), tmp_path_factory.mktemp("model") / "m", torch.float32)


@pytest.fixture(scope="module")
def written(model_dir, tmp_path_factory) -> Path:
    """Four modules of different ranks, so that both name forms and both patterns are used."""
    directory = tmp_path_factory.mktemp("adapter")
    weights = load_file(model_dir / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for module, rank in RANKS.items():
        rows, columns = weights[f"{module}.weight"].shape
        factors[module] = (torch.randn(rank, columns, generator=generator),
                           torch.randn(rows, rank, generator=generator))
    write_adapter(directory, factors, base_name=str(model_dir),
                  all_modules=[n.removesuffix(".weight") for n in weights])
    return directory


@pytest.fixture
def damaged(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "adapter"))


def test_config_is_to_peft_the_one_that_it_would_write(written, tmp_path):
    """We write it without PEFT, which takes seconds to import; PEFT's own class is the oracle."""
    ours = json.loads((written / "adapter_config.json").read_text())
    largest = max(RANKS.values())
    smaller = {module: rank for module, rank in RANKS.items() if rank < largest}
    theirs = LoraConfig(
        r=largest, lora_alpha=largest, rank_pattern=smaller, alpha_pattern=dict(smaller),
        target_modules=ours["target_modules"], bias="none", modules_to_save=None,
        task_type="CAUSAL_LM", base_model_name_or_path=ours["base_model_name_or_path"],
        inference_mode=True)
    theirs.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(whole["target_modules"]) == sorted(ours["target_modules"])
    assert {key: whole[key] for key in ours} == ours | {"target_modules": whole["target_modules"]}
    read = LoraConfig.from_pretrained(written).to_dict()
    assert read == LoraConfig.from_pretrained(tmp_path).to_dict() | {
        "peft_version": read["peft_version"]}


def test_peft_finds_every_key_and_no_other(written, model_dir):
    config = LoraConfig.from_pretrained(written)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    result = set_peft_model_state_dict(model, load_file(written / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    adapted = {name.removeprefix("base_model.model."): module
               for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {name: module.r["default"] for name, module in adapted.items()} == RANKS
    assert {module.scaling["default"] for module in adapted.values()} == {1.0}


def test_peft_writes_the_same_files(written, model_dir, tmp_path):
    """Loaded and saved again by PEFT: the same keys, shapes, values and config entries.

    Entries that we leave to PEFT come back at PEFT's defaults.
    """
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), written)
    model.save_pretrained(tmp_path)
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (written, tmp_path))
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=0)
    ours, theirs = (json.loads((d / "adapter_config.json").read_text())
                    for d in (written, tmp_path))
    theirs["target_modules"].sort()
    defaults = LoraConfig().to_dict()
    assert theirs == {key: defaults[key] for key in theirs} | ours | {
        "peft_version": theirs["peft_version"]}


def test_config_of_mixed_ranks(written):
    config = json.loads((written / "adapter_config.json").read_text())
    smaller = {module: rank for module, rank in RANKS.items() if rank < 6}
    assert config["r"] == config["lora_alpha"] == 6
    assert config["rank_pattern"] == config["alpha_pattern"] == smaller
    assert config["target_modules"] == sorted(
        ["k_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
    assert list(config) == sorted(config)


def test_reads_its_own_files(written):
    adapter = Adapter(written)
    assert adapter.sidecar is None
    assert {name: (m.rank, m.scaling) for name, m in adapter.modules.items()} == {
        name: (rank, 1.0) for name, rank in RANKS.items()}
    factors = load_file(written / "adapter_model.safetensors")
    lora_a, lora_b = adapter.read_factors(MODULES[1])
    assert torch.equal(lora_a, factors[f"base_model.model.{MODULES[1]}.lora_A.weight"])
    assert torch.equal(lora_b, factors[f"base_model.model.{MODULES[1]}.lora_B.weight"])
    with pytest.raises(CheckpointError, match="has no sidecar"):
        adapter.read_side_delta("model.norm.weight")


@pytest.mark.parametrize(("modules", "expected"), [
    (["a.0.q", "a.1.q"], ["q"]),
    (["a.1.q"], ["a.1.q"]),
    (["a.0.q", "a.1.q", "a.1.v"], ["a.1.v", "q"])])
def test_short_names_only_where_they_hit_nothing_else(modules, expected):
    everything = ["a.0.q", "a.1.q", "a.0.v", "a.1.v", "a.11.q_extra"]
    assert shorten(modules, everything) == expected
    config = LoraConfig(target_modules=expected)
    assert [m for m in everything if check_target_module_exists(config, m)] == modules


@pytest.mark.parametrize(("change", "message"), [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ({"use_dora": True}, "use_dora is True"),
    ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    ({"init_lora_weights": "OLoRA"}, "init_lora_weights is 'OLoRA'")])
def test_other_kinds_of_adapter_are_refused_by_name(damaged, change, message):
    edit_json(damaged / "adapter_config.json", **change)
    with pytest.raises(CompatibilityError, match=message):
        Adapter(damaged)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva"])
def test_inits_that_leave_the_base_alone_are_read(damaged, init):
    edit_json(damaged / "adapter_config.json", init_lora_weights=init)
    assert len(Adapter(damaged).modules) == 4


@pytest.mark.parametrize("key", [
    "base_model.model.model.embed_tokens.lora_embedding_C",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
    "base_model.model.model.norm.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    "base_model.model.lm_head.base_layer.weight",
    "model.layers.0.self_attn.o_proj.lora_A.weight"])
def test_other_tensors_are_refused_by_name(damaged, key):
    file = damaged / "adapter_model.safetensors"
    save_file({**load_file(file), key: torch.ones(2, 2)}, file)
    with pytest.raises(CompatibilityError, match=f"tensor '{key}'"):
        Adapter(damaged)


def test_missing_factor(damaged):
    file = damaged / "adapter_model.safetensors"
    factors = load_file(file)
    del factors[f"base_model.model.{MODULES[0]}.lora_B.weight"]
    save_file(factors, file)
    with pytest.raises(CheckpointError, match=f"{MODULES[0]} has lora_A but not the other factor"):
        Adapter(damaged)


def test_rank_that_the_config_does_not_say(damaged):
    edit_json(damaged / "adapter_config.json", rank_pattern={})
    with pytest.raises(CheckpointError, match="rank 3 in lora_A, 3 in lora_B and 6 in"):
        Adapter(damaged)


def test_alpha_that_is_no_number(damaged):
    edit_json(damaged / "adapter_config.json", lora_alpha=None)
    with pytest.raises(CheckpointError, match=r"lora_alpha of .* is None"):
        Adapter(damaged)


def test_scalings_are_pefts(damaged, model_dir):
    edit_json(damaged / "adapter_config.json", lora_alpha=10, use_rslora=True,
              alpha_pattern={"k_proj": 7, r"layers\.0.*": 99})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir),
                           LoraConfig.from_pretrained(damaged))
    expected = {name.removeprefix("base_model.model."): module.scaling["default"]
                for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {n: m.scaling for n, m in Adapter(damaged).modules.items()} == expected
    assert expected[MODULES[1]] == 7 / math.sqrt(3)  # the first pattern that fits wins
    assert expected[MODULES[0]] == 99 / math.sqrt(6)


def test_no_factors(damaged):
    save_file({}, damaged / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds no LoRA factors"):
        Adapter(damaged)


def test_pickled_adapter(damaged):
    (damaged / "adapter_model.safetensors").rename(damaged / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, a pickle"):
        Adapter(damaged)


def test_no_adapter(tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: no such file"):
        Adapter(tmp_path)


def test_streaming_writes_the_same_file_one_factor_at_a_time(written, model_dir, tmp_path):
    weights = load_file(model_dir / "model.safetensors")
    factors = load_file(written / "adapter_model.safetensors")
    modules = [LoraModule(name, rank, 1.0, *weights[f"{name}.weight"].shape)
               for name, rank in RANKS.items()]
    asked = []

    def read(module: str, factor: str) -> torch.Tensor:
        asked.append((module, factor))
        return factors[f"base_model.model.{module}.{factor}.weight"]
    stream_adapter(tmp_path, modules, "F32", read, base_name=str(model_dir),
                   all_modules=[n.removesuffix(".weight") for n in weights])
    assert asked == [(name, f"lora_{x}") for name in sorted(RANKS) for x in "AB"]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / file).read_bytes() == (written / file).read_bytes()


def test_header_bytes_bound_the_file_of_every_lower_rank(written, model_dir):
    weights = load_file(model_dir / "model.safetensors")
    factors = load_file(written / "adapter_model.safetensors")
    rest = ((written / "adapter_model.safetensors").stat().st_size
            - sum(t.nbytes for t in factors.values()))
    for rank in (6, 64, 10_000):
        modules = [LoraModule(name, rank, 1.0, *weights[f"{name}.weight"].shape)
                   for name in RANKS]
        assert rest <= header_bytes(modules, "F32") <= rest + 8 + 24 * len(factors)
