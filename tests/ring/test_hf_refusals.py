"""What a transformers model may ask of its attention that the ring does not compute."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from extend.errors import CompatibilityError
from extend.loading import cache_argument
from extend.ring import ATTENTION_NAME, RingSettings, register_ring_attention
from extend.ring.hf_attention import ring_attention_forward
from tests.ring.tiny_models import DOCUMENTS, SEQ_LEN, VOCABULARY, make_ids, make_model


def test_what_the_ring_cannot_honour_is_refused():
    register_ring_attention()
    model, ids = make_model("llama", ATTENTION_NAME), make_ids()
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with pytest.raises(CompatibilityError, match="an attention mask with 3 padded positions"):
        model(input_ids=ids, attention_mask=padded)
    square = torch.zeros(2, 1, SEQ_LEN, SEQ_LEN)
    with pytest.raises(CompatibilityError, match=r"an attention mask of shape \(2, 1, 64, 64\)"):
        model(input_ids=ids, attention_mask=square)
    with pytest.raises(CompatibilityError, match=r"1 queries against 65 keys \(a KV cache\)"):
        model(input_ids=ids[:, :1],
              **{cache_argument(model): model(input_ids=ids).past_key_values})
    with pytest.raises(CompatibilityError, match=r"attention dropout 0.1; set attention_dropout"):
        make_model("llama", ATTENTION_NAME, attention_dropout=0.1).train()(input_ids=ids)


@pytest.mark.parametrize("cu_seqlens", [None, (0, 64), (0, 39, 64)])
def test_positions_restart_only_where_a_document_begins(cu_seqlens):
    register_ring_attention()
    restart = torch.cat((torch.arange(40), torch.arange(24))).unsqueeze(0)
    model, calls = make_model("llama", ATTENTION_NAME), {"use_cache": False}
    with pytest.raises(CompatibilityError, match="position_ids that restart inside a row"):
        model(
            input_ids=make_ids(1), position_ids=restart, ring=RingSettings(cu_seqlens=cu_seqlens),
            **calls,
        )  # fmt: skip
    settings = RingSettings(cu_seqlens=(0, 10, 40, 64))  # one boundary without a restart
    model(input_ids=make_ids(1), position_ids=restart, ring=settings, **calls)


def test_boundaries_that_do_not_fit_the_call_are_refused():
    register_ring_attention()
    model = make_model("llama", ATTENTION_NAME)
    with pytest.raises(CompatibilityError, match="2 rows of packed documents"):
        model(input_ids=make_ids(2), use_cache=False, ring=RingSettings(cu_seqlens=DOCUMENTS))
    with pytest.raises(CompatibilityError, match=r"ending at 60, for a sequence of 64 tokens"):
        model(input_ids=make_ids(1), use_cache=False, ring=RingSettings(cu_seqlens=(0, 60)))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"softcap": 30.0}, "capped scores"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"cu_seq_lens_q": torch.tensor([0, 8])}, "packed documents .* RingSettings"),
    ],
)
def test_unsupported_keywords_are_refused_by_name(keywords, message):
    q = torch.zeros(1, 4, 8, 8)
    with pytest.raises(CompatibilityError, match=message):
        ring_attention_forward(torch.nn.Module(), q, q, q, None, **keywords)


def test_capped_scores_of_a_model_are_refused():
    register_ring_attention()
    model = make_model("gemma2 window", ATTENTION_NAME, attn_logit_softcapping=50.0)
    with pytest.raises(CompatibilityError, match="capped scores"):
        model(input_ids=make_ids(), use_cache=False)


def test_chunked_attention_is_refused():
    register_ring_attention()
    config = Llama4TextConfig(
        hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=VOCABULARY,
        num_local_experts=2, attention_chunk_size=16, pad_token_id=0,
    )  # fmt: skip
    model = Llama4ForCausalLM._from_config(config, attn_implementation=ATTENTION_NAME)
    with pytest.raises(CompatibilityError, match="layer 0 of type 'chunked_attention'"):
        model(input_ids=make_ids(), use_cache=False)


@pytest.mark.parametrize(
    "config",
    [{"sliding_window": 4}, {"sliding_window": 4, "layer_types": ["", "sliding_attention"]}],
)
def test_a_window_that_the_layer_does_not_pass_on_is_refused(config):
    """Some models only put it into the mask, which is never built here."""
    module = torch.nn.Module()
    module.layer_idx, module.config = 1, SimpleNamespace(**config)
    q = torch.zeros(1, 4, 8, 8)
    with pytest.raises(CompatibilityError, match="the sliding window of 4 in layer 1"):
        ring_attention_forward(module, q, q, q, None)
    unused = module.config
    unused.use_sliding_window, unused.layer_types = False, None
    ring_attention_forward(module, q, q, q, None)
