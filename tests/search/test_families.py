"""Families whose configs cannot hold every method."""

from pathlib import Path

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from extend.errors import CompatibilityError
from extend.search import search
from extend.search.models import SearchedModel
from tests.search.test_search import SMALL, read
from tests.tiny_text import make_tokenizer


@pytest.fixture(scope="module")
def phi_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("phi") / "phi3"
    Phi3ForCausalLM(Phi3Config(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        sliding_window=None)).save_pretrained(directory)
    make_tokenizer("bytes-bos").save_pretrained(directory)
    return directory


def test_methods_that_the_family_cannot_hold_are_left_out(phi_dir: Path, text_file: Path,
                                                          tmp_path: Path):
    search(phi_dir, tmp_path / "out", text=text_file, **SMALL)
    found = read(tmp_path / "out")
    assert "plain RoPE or longrope only" in found["left_out"]["linear"]
    methods = {row["method"] for row in found["chosen"].values()}
    assert methods <= {"ntk", "critical", "theta", "longrope", "gradient-v1", "gradient-v2"}
    assert {"ntk", "critical"} <= set(found["table"]["search"])


def test_a_model_that_holds_no_method_says_why(phi_dir: Path, text_file: Path, tmp_path: Path,
                                               monkeypatch):
    def refuse(self, rope, length):
        raise CompatibilityError("has no module rotary_emb")

    monkeypatch.setattr(SearchedModel, "use", refuse)
    with pytest.raises(CompatibilityError, match="has no module rotary_emb"):
        search(phi_dir, tmp_path / "out", text=text_file, **SMALL)
    assert not (tmp_path / "out").exists()
