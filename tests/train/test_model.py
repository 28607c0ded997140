"""What is trained, under which RoPE, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
)

from extend.errors import CompatibilityError, RecipeError
from extend.model_config import RopeSpec, read_config, write_rope
from extend.rope.live import set_rope
from extend.train.model import load_model
from extend.train.size import ModelSize, layer_windows, model_size
from extend.train.trained import trained_parameters
from extend.train_options import TrainOptions
from tests.train.tiny import options, save_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def load(directory: Path, **changes: object) -> nn.Module:
    run: TrainOptions = options(directory, [{"kind": "retrieval"}], **changes)
    return load_model(run, read_config(directory))


def test_full_mode_trains_everything(model_dir: Path):
    model = load(model_dir)
    assert all(p.requires_grad for p in model.parameters())


def test_trainable_chooses_by_name(model_dir: Path):
    model = load(model_dir, trainable=[r"layers\.1\..*norm", r"q_proj\.weight$"])
    assert set(trained_parameters(model)) == {
        "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"}


@pytest.mark.parametrize(("expression", "match"), [
    ("w_proj", "'w_proj' matches no parameter"), ("(", "no regular expression")])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_bad_expression_is_refused(expression: str, match: str, mode: str, model_dir: Path):
    with pytest.raises(RecipeError, match=match):
        load(model_dir, mode=mode, trainable=["q_proj", expression])


def test_lora_adapts_every_linear_layer_of_the_decoder(model_dir: Path):
    model = load(model_dir, mode="lora", lora_rank=3)
    names = set(trained_parameters(model))
    assert len(names) == 2 * 2 * 7
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert not any("lm_head" in name for name in names)
    again = dict(load(model_dir, mode="lora", lora_rank=3).named_parameters())
    for name in names:  # every process starts from the same adapters
        torch.testing.assert_close(again[name], model.get_parameter(name), rtol=0, atol=0)


def test_lora_on_chosen_layers(model_dir: Path):
    model = load(model_dir, mode="lora", trainable=["0.self_attn.[qk]_proj"])
    assert len(trained_parameters(model)) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_that_is_trained_has_the_weight_dtype(dtype: str, model_dir: Path):
    model = load(model_dir, mode="lora", weight_dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("rope", [
    RopeSpec(rope_theta=5e5, rotary_dim=8, original_len=256),
    RopeSpec(rope_theta=1e4, rotary_dim=8, original_len=64, scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
])
def test_set_rope_equals_loading_with_that_rope(rope: RopeSpec, model_dir: Path, tmp_path: Path):
    model = load(model_dir)
    raw = read_config(model_dir).raw
    set_rope(model, raw, rope, 256, torch.device("cpu"))
    shutil.copytree(model_dir, tmp_path / "scaled")
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(write_rope(raw, rope, 256)))
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "scaled", attn_implementation="eager")
    assert AutoConfig.from_pretrained(tmp_path / "scaled").max_position_embeddings == 256
    ids = torch.randint(0, 200, (1, 200))
    torch.testing.assert_close(
        model.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq, rtol=0, atol=0)
    # Another attention kernel, both fp32.
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, fresh(input_ids=ids).logits,
                               rtol=1e-4, atol=1e-4)


def test_logits_that_are_not_a_plain_product_are_refused(model_dir: Path, tmp_path: Path):
    shutil.copytree(model_dir, tmp_path / "capped")
    config = json.loads((model_dir / "config.json").read_text()) | {"final_logit_softcapping": 30.0}
    (tmp_path / "capped" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompatibilityError, match=r"final_logit_softcapping is 30\.0"):
        load(tmp_path / "capped")


def test_a_model_with_attentions_of_its_own_is_refused(model_dir: Path, tmp_path: Path):
    shutil.copytree(model_dir, tmp_path / "falcon")
    FalconConfig(vocab_size=264, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                 intermediate_size=64, alibi=False).save_pretrained(tmp_path / "falcon")
    with pytest.raises(CompatibilityError, match="'falcon' models choose among attentions of"):
        load(tmp_path / "falcon")


@pytest.mark.parametrize("tied", [True, False])
def test_flops_count_matrices_and_half_the_square(tied: bool, tmp_path: Path):
    directory = save_model(tmp_path / "model", tied=tied)
    size = model_size(load(directory), read_config(directory))
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    matrices = 2 * layer + 264 * 32
    attention = 12 * 2 * 32 * 100**2 / 2
    assert size.flops(100, size.squares([100])) == 6 * matrices * 100 + attention


def test_squares_count_what_documents_and_windows_leave():
    """Against a count of the pairs, one by one: twice their number, less half of the diagonal."""
    size = ModelSize(0, 0, 1, (None, 7, 7, 30))
    lengths = [1, 6, 7, 8, 29, 30, 41]
    pairs = [[min(query + 1, window or n) for query in range(n)]
             for n in lengths for window in size.windows]
    assert size.squares(lengths) == sum(2 * sum(seen) - max(seen) for seen in pairs)


@pytest.mark.parametrize(("make", "changes", "windows"), [
    (LlamaForCausalLM, {}, (None, None)),
    (MistralForCausalLM, {"sliding_window": 9}, (9, 9)),
    (Qwen2ForCausalLM, {"sliding_window": 9}, (None, None)),
    (Qwen2ForCausalLM, {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
     (None, 9)),
])
def test_windows_of_layers_are_those_of_transformers(make: type, changes: dict, windows: tuple):
    config = make.config_class(vocab_size=50, hidden_size=32, intermediate_size=48,
                               num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                               **changes)
    assert layer_windows(make(config)) == windows
