"""Models whose training would leave out or change something are refused by name."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from extend.errors import CompatibilityError
from extend.model_config import read_config
from extend.train.model import load_model
from extend.train.supported import check_config, check_layers
from tests.train.tiny import options, save_model

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
         "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def make_config(family: str, **changes: object) -> dict:
    return AutoConfig.for_model(family, **(SIZES | changes)).to_dict()


@pytest.mark.parametrize(("family", "changes", "match"), [
    ("starcoder2", {"residual_dropout": 0.1, "embedding_dropout": 0.2},
     r"asks for residual_dropout 0\.1, embedding_dropout 0\.2; .* write 0"),
    ("seed_oss", {"head_dim": 8}, r"attention_dropout 0\.1, residual_dropout 0\.1"),
    ("phimoe", {}, r"router_jitter_noise 0\.01"),  # by default, so in no file
    ("opt", {"ffn_dim": 24}, r"asks for dropout 0\.1"),
    ("cohere", {}, r"logit_scale is 0\.0625"),
    ("mixtral", {"output_router_logits": True}, "output_router_logits is true"),
    ("granite", {"logits_scaling": 8.0}, r"logits_scaling is 8\.0"),
])
def test_configs_that_ask_for_more_are_refused(family: str, changes: dict, match: str):
    with pytest.raises(CompatibilityError, match=f"here: .*{match}"):
        check_config("here", make_config(family, **changes))


@pytest.mark.parametrize(("family", "changes"), [
    ("starcoder2", {}), ("llama", {}), ("gpt_neox", {"classifier_dropout": 0.1}), ("mixtral", {}),
    ("granite", {"attention_multiplier": 0.1}), ("olmo2", {}), ("smollm3", {})])
def test_plain_configs_are_not(family: str, changes: dict):
    check_config("here", make_config(family, **changes))


@pytest.mark.parametrize(("family", "changes", "match"), [
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of type 'conv'"),
    ("mamba", {"state_size": 4}, "in .*(mixer.conv1d|'linear_attention')"),
    ("phi", {}, "output head has a bias"),
])
def test_layers_where_tokens_meet_outside_of_attention_are_refused(family: str, changes: dict,
                                                                   match: str):
    """Two ranks would each run them on their own half of a row, without an error."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | changes)))
    with pytest.raises(CompatibilityError, match=match):
        check_layers(model)


def test_loading_checks_both(tmp_path: Path):
    good = save_model(tmp_path / "good")
    shutil.copytree(good, tmp_path / "noisy")
    config = json.loads((good / "config.json").read_text()) | {"attention_dropout": 0.1}
    (tmp_path / "noisy" / "config.json").write_text(json.dumps(config))
    run = options(tmp_path / "noisy", [{"kind": "retrieval"}])
    with pytest.raises(CompatibilityError, match=r"config.json: asks for attention_dropout 0\.1"):
        load_model(run, read_config(run.model))
