import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from extend.adapter import extract
from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.evaluate.adapted import adapted_config
from extend.evaluate.load import load_model
from extend.loading import choose_device, choose_dtype
from extend.tokenizer import load_tokenizer
from tests.evaluate.conftest import save_model

CPU = torch.device("cpu")


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(60).reshape(1, 60)).logits


def test_device_and_dtype():
    assert choose_device("cpu") == CPU
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("float16", CPU) == torch.float16
    with pytest.raises(RecipeError, match="dtype: unknown 'fp8'"):
        choose_dtype("fp8", CPU)
    with pytest.raises(RecipeError, match="'gpu' is not a device"):
        choose_device("gpu")
    with pytest.raises(CompatibilityError, match="'cuda:99' is not there"):
        choose_device("cuda:99")


def test_weights_of_another_config_are_refused(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="9 missing keys for LlamaForCausalLM, the first 'm"):
        load_model(tmp_path / "m", device=CPU, dtype=torch.float32)


def test_truncated_weights_are_named(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_model(tmp_path / "m", device=CPU, dtype=torch.float32)


def test_missing_tokenizer_is_named(model_dir, tmp_path):
    shutil.copy(model_dir / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_plain_adapter_equals_peft(model_dir, tmp_path):
    base = LlamaForCausalLM.from_pretrained(model_dir)
    tuned = get_peft_model(base, LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = load_model(model_dir, adapter=tmp_path / "adapter", device=CPU, dtype=torch.float32)
    loaded.set_attn_implementation("sdpa")
    # fp32: W + BA first and x(W + BA) against xW + (xA)B; logits are of size 10.
    torch.testing.assert_close(logits_of(loaded), logits_of(tuned), rtol=1e-4, atol=1e-4)


def test_adapter_with_sidecar_is_the_tuned_model(model_dir, tmp_path):
    """Full rank and every other delta: base + adapter has the tuned model's weights and RoPE."""
    tuned = LlamaForCausalLM.from_pretrained(model_dir)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(tmp_path / "tuned")
    config_file = tmp_path / "tuned" / "config.json"
    raw = json.loads(config_file.read_text())
    raw |= {"max_position_embeddings": 2048, "rope_theta": 50000.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
    config_file.write_text(json.dumps(raw))
    adapter = extract(model_dir, tmp_path / "tuned", tmp_path / "adapter", rank=32)
    config = adapted_config(model_dir, adapter)
    assert config.max_position_embeddings == 2048 and config.rope.rope_theta == 50000.0
    loaded = load_model(model_dir, adapter=adapter, device=CPU, dtype=torch.float32)
    expected = load_model(tmp_path / "tuned", device=CPU, dtype=torch.float32)
    for name, parameter in expected.named_parameters():
        # The factors are fp32: a product of rank 32 is off by a few eps of the delta's size.
        torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(loaded), logits_of(expected), rtol=1e-3, atol=1e-3)


def test_adapter_of_another_model_is_refused(model_dir, tmp_path):
    other = save_model(tmp_path / "other", hidden_size=24)
    tuned = save_model(tmp_path / "tuned", seed=1, hidden_size=24)
    adapter = extract(other, tuned, tmp_path / "adapter", rank=2)
    with pytest.raises(CompatibilityError, match=r"was made for another model than .*hidden|shape"):
        load_model(model_dir, adapter=adapter, device=CPU, dtype=torch.float32)
