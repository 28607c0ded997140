import pytest
import torch
from torch.testing import assert_close

from extend.errors import CompatibilityError
from extend.transfer.sums import LowRank, added, whole
from tests.transfer.conftest import random_deltas

IDS = torch.arange(3, 40)[None]


def test_sums_are_a_merge(model, directory):
    """Also of the tied head, which is the embedding under a second name."""
    deltas = random_deltas(model, seed=1, scale=0.2)
    factors = {name: 0.3 + 0.1 * i for i, name in enumerate(deltas)}
    merged = type(model).from_pretrained(directory, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, delta in deltas.items():
            merged.get_parameter(name).add_(factors[name] * delta)
        plain = model(IDS).logits
        with added(model, deltas, factors):
            assert_close(model(IDS).logits, merged(IDS).logits, atol=1e-4, rtol=1e-4)
        assert_close(model(IDS).logits, plain, atol=0, rtol=0)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert_close(dict(after), before, atol=0, rtol=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_sum_of_bfloat16_is_rounded_once(model):
    name = "model.layers.0.mlp.up_proj.weight"
    model = model.to(torch.bfloat16)
    weight = model.get_parameter(name).detach().clone()
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    with added(model, {name: delta}, {name: 0.7}):
        assert_close(model.get_submodule(name.removesuffix(".weight")).weight,
                     (weight.float() + 0.7 * delta).bfloat16(), atol=0, rtol=0)


def test_factors_of_a_lora_stand_for_their_product(model):
    generator = torch.Generator().manual_seed(0)
    low = LowRank(torch.randn(3, 32, generator=generator), torch.randn(48, 3, generator=generator),
                  0.5)
    assert_close(whole(low), 0.5 * low.lora_B @ low.lora_A)
    assert low.shape == (48, 32)


def test_deltas_that_do_not_fit_are_all_named(model):
    deltas = {"model.layers.7.mlp.up_proj.weight": torch.zeros(48, 32),
              "model.layers.0.mlp.up_proj.weight": torch.zeros(48, 31)}
    with pytest.raises(CompatibilityError, match=r"layers\.7.* no such parameter; .*\[48, 31\] but "
                                                 r"the model has \[48, 32\]"), \
            added(model, deltas, dict.fromkeys(deltas, 1.0)):
        pass
    assert not hasattr(model.model.layers[0].mlp.up_proj, "parametrizations")
