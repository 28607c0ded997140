"""transformers models on the ring against the same models on one process with torch's attention."""

import itertools

import pytest
import torch
from transformers import AttentionInterface

from extend.ring import (
    ATTENTION_NAME,
    LAYOUTS,
    RingSettings,
    hf_attention,
    register_ring_attention,
    shard,
    unshard,
)
from extend.ring.hf_attention import ring_attention_forward
from tests.ring.tiny_models import (
    DOCUMENTS,
    SEQ_LEN,
    VOCABULARY,
    WINDOWED,
    make_ids,
    make_model,
)
from tests.spawn import spawn


def loss_of(logits, weights):
    """A fixed linear function of the logits: its gradient reaches every position."""
    return (logits * weights).sum()


def make_weights(rows=2):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, SEQ_LEN, VOCABULARY, generator=generator)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(logits, grads, expected_logits, expected_grads):
    """fp32 throughout; sums in another order over 64 positions and 2 layers."""
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    for name, expected in expected_grads.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            grads[name], expected, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def run_plain(name, ids, weights, **options):
    """Logits and gradients of whole rows with torch's own attention."""
    model = make_model(name, "eager", **options).train()
    logits = model(input_ids=ids, use_cache=False).logits
    loss_of(logits, weights).backward()
    return logits.detach(), gradients(model)


def run_on_ring(rank, world, name, checkpointing, layout, strategy="auto"):
    """This rank's logits, and its share of all parameter gradients."""
    register_ring_attention()
    model = make_model(name, ATTENTION_NAME).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    positions = LAYOUTS[layout].positions(SEQ_LEN, rank, world).unsqueeze(0)
    ids, weights = (shard(t, 1, layout, rank, world) for t in (make_ids(), make_weights()))
    settings = RingSettings(layout=layout, strategy=strategy)
    output = model(input_ids=ids, position_ids=positions, use_cache=False, ring=settings)
    loss_of(output.logits, weights).backward()
    return output.logits.detach(), gradients(model)


def run_packed_on_ring(rank, world, name, restart, layout, strategy="auto"):
    """The same for one row of documents, whose positions restart with each or run on."""
    register_ring_attention()
    model = make_model(name, ATTENTION_NAME).train()
    positions = torch.arange(SEQ_LEN).unsqueeze(0)
    if restart:
        sizes = torch.tensor(DOCUMENTS).diff().tolist()
        positions = torch.cat([torch.arange(size) for size in sizes]).unsqueeze(0)
    ids, weights, positions = (
        shard(t, 1, layout, rank, world) for t in (make_ids(1), make_weights(1), positions)
    )
    settings = RingSettings(layout=layout, strategy=strategy, cu_seqlens=DOCUMENTS)
    output = model(input_ids=ids, position_ids=positions, use_cache=False, ring=settings)
    loss_of(output.logits, weights).backward()
    return output.logits.detach(), gradients(model)


RING_CASES = [
    ("llama", False, "zigzag"),
    ("llama", True, "zigzag"),
    ("llama", False, "striped"),
    ("mistral", True, "zigzag"),
    ("qwen2", True, "zigzag"),
    ("qwen3", True, "zigzag"),
    *((name, False, "zigzag") for name in WINDOWED),
    ("mistral window", True, "striped"),
    ("gemma3 window", True, "contiguous"),
    ("gemma3 window", True, "zigzag", "ulysses"),
    ("qwen2 window", False, "zigzag", "all-gather"),
]
PACKED_CASES = [
    ("llama", False, "zigzag"),
    ("llama", True, "zigzag"),
    ("mistral window", False, "zigzag"),
    ("gemma3 window", True, "striped"),
    ("mistral window", True, "zigzag", "all-gather"),
    ("llama", False, "zigzag", "usp:2"),
    ("gemma3 window", False, "zigzag", "ring"),
]


def run_ring_cases(rank, world):
    plain = [run_on_ring(rank, world, *case) for case in RING_CASES]
    return plain, [run_packed_on_ring(rank, world, *case) for case in PACKED_CASES]


@pytest.fixture(scope="module")
def on_two_ranks():
    """Per case the whole row's logits and the summed gradients."""

    def join(case, results):
        parts, shares = zip(*results, strict=True)
        summed = {name: sum(share[name] for share in shares) for name in shares[0]}
        return unshard(parts, 1, case[2]), summed

    ranks = spawn(2, run_ring_cases)
    return [
        {case: join(case, [rank[kind][i] for rank in ranks]) for i, case in enumerate(cases)}
        for kind, cases in enumerate((RING_CASES, PACKED_CASES))
    ]


@pytest.mark.parametrize("case", RING_CASES, ids=str)
def test_model_on_two_ranks_equals_the_model_on_one(on_two_ranks, case):
    assert_same(*on_two_ranks[0][case], *run_plain(case[0], make_ids(), make_weights()))


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_on_one_rank_are_those_of_transformers(name):
    expected = run_plain(name, make_ids(), make_weights())
    assert_same(*run_on_ring(0, 1, name, False, "zigzag"), *expected)
    wide, _ = run_plain(name, make_ids(), make_weights(), sliding_window=SEQ_LEN)
    assert (wide - expected[0]).abs().max() > 1e-2  # the window does change the model


def run_documents_alone(name):
    """Logits and summed gradients of each document as a row of its own, from position 0 on."""
    model = make_model(name, "eager").train()
    logits = []
    for begin, end in itertools.pairwise(DOCUMENTS):
        logits.append(model(input_ids=make_ids(1)[:, begin:end], use_cache=False).logits)
        loss_of(logits[-1], make_weights(1)[:, begin:end]).backward()
    return torch.cat(logits, 1).detach(), gradients(model)


@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_a_packed_row_equals_each_document_alone(on_two_ranks, case):
    expected = run_documents_alone(case[0])
    assert_same(*on_two_ranks[1][case], *expected)
    assert_same(*run_packed_on_ring(0, 1, *case), *expected)


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


def test_layers_with_the_same_mask_share_one_object(monkeypatch):
    register_ring_attention()
    masks, settings = [], []

    def record(query, key, value, *, mask, strategy, **kwargs):
        masks.append(mask)
        settings.append(strategy)
        return query

    monkeypatch.setattr(hf_attention, "attend", record)
    model = make_model(
        "gemma3 window", ATTENTION_NAME, num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model(
        input_ids=make_ids(1), use_cache=False,
        ring=RingSettings(strategy="ring", cu_seqlens=DOCUMENTS),
    )  # fmt: skip
    assert [(mask.causal, mask.window, mask.cu_seqlens) for mask in masks] == [
        (True, 7, DOCUMENTS), (True, 7, DOCUMENTS), (True, None, DOCUMENTS)
    ] * 2  # fmt: skip
    assert len({id(mask) for mask in masks}) == 2
    assert settings == ["ring"] * 6
