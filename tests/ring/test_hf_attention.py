"""transformers models on the ring against the same models on one process with torch's attention."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from extend.errors import CompatibilityError
from extend.ring import (
    ATTENTION_NAME,
    LAYOUTS,
    RingSettings,
    register_ring_attention,
    shard,
    unshard,
)
from extend.ring.hf_attention import ring_attention_forward
from tests.spawn import spawn

SEQ_LEN, VOCABULARY = 64, 50
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def make_model(name, attention, **options):
    config_class, model_class = MODELS[name]
    options = {"sliding_window": None} | options
    config = config_class(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=VOCABULARY, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return model_class._from_config(config, attn_implementation=attention)


def make_ids():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (2, SEQ_LEN), generator=generator)


def loss_of(logits, weights):
    """A fixed linear function of the logits: its gradient reaches every position."""
    return (logits * weights).sum()


def make_weights():
    return torch.randn(2, SEQ_LEN, VOCABULARY, generator=torch.Generator().manual_seed(2))


def run_on_ring(rank, world, name, checkpointing, layout):
    """This rank's logits, and its share of all parameter gradients."""
    register_ring_attention()
    model = make_model(name, ATTENTION_NAME).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    positions = LAYOUTS[layout].positions(SEQ_LEN, rank, world).unsqueeze(0)
    ids, weights = (shard(t, 1, layout, rank, world) for t in (make_ids(), make_weights()))
    output = model(
        input_ids=ids, position_ids=positions, use_cache=False, ring=RingSettings(layout=layout)
    )
    loss_of(output.logits, weights).backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters()}


RING_CASES = [
    ("llama", False, "zigzag"),
    ("llama", True, "zigzag"),
    ("llama", False, "striped"),
    ("mistral", True, "zigzag"),
    ("qwen2", True, "zigzag"),
    ("qwen3", True, "zigzag"),
]


def run_ring_cases(rank, world):
    return [run_on_ring(rank, world, *case) for case in RING_CASES]


@pytest.fixture(scope="module")
def on_two_ranks():
    ranks = spawn(2, run_ring_cases)
    return {case: [rank[i] for rank in ranks] for i, case in enumerate(RING_CASES)}


@pytest.mark.parametrize("case", RING_CASES, ids=str)
def test_model_on_two_ranks_equals_the_model_on_one(on_two_ranks, case):
    name, _, layout = case
    model = make_model(name, "eager").train()
    logits = model(input_ids=make_ids(), use_cache=False).logits
    loss_of(logits, make_weights()).backward()
    parts, shares = zip(*on_two_ranks[case], strict=True)
    # fp32 throughout; sums in another order over 64 positions and 2 layers
    torch.testing.assert_close(unshard(parts, 1, layout), logits.detach(), rtol=1e-5, atol=1e-6)
    summed = {n: shares[0][n] + shares[1][n] for n in shares[0]}
    expected = {n: p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(summed, expected, rtol=1e-4, atol=2e-5)


def test_without_ring_settings_it_is_attention_on_one_process():
    register_ring_attention()
    ids = make_ids()
    model, plain = make_model("llama", ATTENTION_NAME), make_model("llama", "eager")
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    everything = torch.ones_like(ids)
    with_mask = model(input_ids=ids, attention_mask=everything).logits
    torch.testing.assert_close(with_mask, plain(input_ids=ids).logits)


def test_no_mask_is_built(monkeypatch):
    register_ring_attention()
    seen = []

    def record(module, query, key, value, attention_mask, **kwargs):
        seen.append((attention_mask, kwargs.get("ring")))
        return ring_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(
        AttentionInterface._global_mapping, ATTENTION_NAME, record
    )
    settings = RingSettings(layout="zigzag")
    # positions of rank 0 of 2: their jump looks like packed rows to transformers
    positions = LAYOUTS["zigzag"].positions(2 * SEQ_LEN, 0, 2).unsqueeze(0)
    make_model("llama", ATTENTION_NAME)(
        input_ids=make_ids(), position_ids=positions, use_cache=False, ring=settings
    )
    assert seen == [(None, settings)] * 2


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
    restart = torch.cat((torch.arange(40), torch.arange(24))).unsqueeze(0)
    with pytest.raises(CompatibilityError, match="packed documents"):
        model(input_ids=ids, position_ids=restart, use_cache=False)
    with pytest.raises(CompatibilityError, match=r"1 queries against 65 keys \(a KV cache\)"):
        model(input_ids=ids[:, :1], past_key_values=model(input_ids=ids).past_key_values)


def test_windows_and_dropout_are_refused():
    register_ring_attention()
    ids = make_ids()
    with pytest.raises(CompatibilityError, match="window of 32 over 64 tokens in layer 0"):
        make_model("mistral", ATTENTION_NAME, sliding_window=32)(input_ids=ids)
    wide = make_model("mistral", ATTENTION_NAME, sliding_window=64)
    plain = make_model("mistral", "eager")
    torch.testing.assert_close(wide(input_ids=ids).logits, plain(input_ids=ids).logits)
    with pytest.raises(CompatibilityError, match=r"attention dropout 0.1; set attention_dropout"):
        make_model("llama", ATTENTION_NAME, attention_dropout=0.1).train()(input_ids=ids)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"softcap": 30.0}, "capped scores"), ({"s_aux": torch.zeros(4)}, "attention sinks")],
)
def test_unsupported_keywords_are_refused_by_name(keywords, message):
    q = torch.zeros(1, 4, 8, 8)
    with pytest.raises(CompatibilityError, match=message):
        ring_attention_forward(torch.nn.Module(), q, q, q, None, **keywords)


def test_layers_of_another_kind_are_refused():
    module = torch.nn.Module()
    module.layer_idx, module.config = 1, SimpleNamespace(
        layer_types=["full_attention", "chunked_attention"]
    )
    q = torch.zeros(1, 4, 8, 8)
    with pytest.raises(CompatibilityError, match="layer 1 of type 'chunked_attention'"):
        ring_attention_forward(module, q, q, q, None)
