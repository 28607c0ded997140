"""Methods and layer weights against closed forms."""

import json

import pytest
import torch

from extend.errors import RecipeError
from extend.merge import merge, total
from extend.merge.methods import METHODS, make_method
from extend.merge.total import row_blocks
from extend.merge.weights import LayerWeights
from extend.options import MergeOptions
from extend.recipe import check_family
from tests.merge.test_apply import weights
from tests.merge.test_deltas import added, assert_merged, deltas_of


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_add_is_the_delta():
    delta = draw(3, 4)
    assert torch.equal(make_method("add", {}).adjust("w", delta.clone(), draw(3, 4), None), delta)


# ---- drift-aware ---------------------------------------------------------------------------------

def stretched(drift: torch.Tensor) -> torch.Tensor:
    """1 - sigmoid(12 d - 6), scaled in fp64 so that 0 gives 1 and 1 gives 0."""
    d = drift.double().abs() / drift.double().abs().max()
    ends = torch.tensor([0.0, 1.0]).double()
    low, high = torch.sigmoid(12 * ends - 6)
    return (high - torch.sigmoid(12 * d - 6)) / (high - low)


def test_drift_aware_keeps_what_did_not_move():
    base, drift, delta = draw(5, 7), draw(5, 7, seed=1), draw(5, 7, seed=2)
    drift[1] = 0
    found = make_method("drift-aware", {}).adjust("w", delta.clone(), base + drift, base)
    expected = delta.double() * stretched(base + drift - base)
    # fp32 tanh and division: some units in the last place of a factor up to 1.
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=3e-6)
    torch.testing.assert_close(found[1], delta[1], rtol=2 ** -22, atol=0)
    most = drift.abs().argmax()
    assert found.flatten()[most].abs() < 1e-6


def test_drift_aware_in_blocks_is_that_of_the_whole():
    base, target, delta = draw(9, 3), draw(9, 3, seed=1), draw(9, 3, seed=2)
    whole = make_method("drift-aware", {}).adjust("w", delta.clone(), target, base)
    method = make_method("drift-aware", {})
    blocks = [slice(0, 4), slice(4, 9)]
    method.measure("w", ((target[rows], base[rows]) for rows in blocks))
    parts = [method.adjust("w", delta[rows].clone(), target[rows], base[rows]) for rows in blocks]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_drift_aware_adds_all_to_a_target_that_did_not_move():
    base, delta = draw(3, 3), draw(3, 3, seed=1)
    assert torch.equal(make_method("drift-aware", {}).adjust("w", delta.clone(), base, base), delta)


# ---- orthogonal ----------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("side", ["both", "left", "right"])
def test_orthogonal_removes_the_leading_subspace(shape, side):
    drift, delta = draw(*shape).double(), draw(*shape, seed=1).double()
    u, _, vt = torch.linalg.svd(drift, full_matrices=False)
    left = torch.eye(shape[0]) - u[:, :2] @ u[:, :2].T
    right = torch.eye(shape[1]) - vt[:2].T @ vt[:2]
    expected = (left if side != "right" else torch.eye(shape[0]).double()) @ delta @ (
        right if side != "left" else torch.eye(shape[1]).double())
    method = make_method("orthogonal", {"rank": 2, "side": side})
    found = method.adjust("w", delta.float(), drift.float(), torch.zeros(shape))
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)


def test_orthogonal_by_energy_takes_the_fewest_values():
    u, _ = torch.linalg.qr(draw(6, 6))
    drift = u @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0]))  # energies 9, 4, 1 of 14
    delta = torch.eye(6)
    for energy, kept in ((9 / 14 - 1e-3, 1), (9 / 14 + 1e-3, 2), (13 / 14 + 1e-3, 3), (1.0, 3)):
        method = make_method("orthogonal", {"energy": energy, "side": "left"})
        found = method.adjust("w", delta.clone(), drift, torch.zeros(6, 6))
        assert torch.linalg.matrix_rank(found, atol=1e-3) == 6 - kept, energy


def test_orthogonal_leaves_vectors_and_unmoved_matrices():
    method = make_method("orthogonal", {"rank": 1})
    for shape in ((5,), (3, 4)):
        delta, base = draw(*shape), draw(*shape, seed=1)
        target = base if len(shape) == 2 else base + 1
        assert torch.equal(method.adjust("w", delta.clone(), target, base), delta)


@pytest.mark.parametrize(("options", "message"), [
    ({}, "give one of the two"), ({"rank": 1, "energy": 0.5}, "give one of the two"),
    ({"rank": 0}, "at least 1"), ({"energy": 1.5}, r"in \(0, 1\]"),
    ({"rank": 1, "side": "up"}, "choose one of both, left, right")])
def test_options_of_orthogonal(options, message):
    with pytest.raises(RecipeError, match=message):
        make_method("orthogonal", options)


def test_numbers_of_a_recipe_are_whole_ranks():
    assert make_method("orthogonal", {"rank": 4.0}).rank == 4


# ---- in a merge ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("method", "options"), [
    ("drift-aware", {}), ("orthogonal", {"rank": 3}), ("orthogonal", {"energy": 0.5})])
def test_a_merge_adjusts_each_delta(llama, tmp_path, monkeypatch, method, options):
    monkeypatch.setattr(total, "_BLOCK_BYTES", 4 * 64 * 5)
    models = llama.models
    out = merge(llama.adapter, models.target, tmp_path / "out", method=method, options=options,
                base=models.base, weight=0.5)
    made, base, target = make_method(method, options), weights(models.base), weights(models.target)
    deltas = {}
    for name, delta in deltas_of(llama.adapter).items():
        whole = made.by_rows or ".layers." in name
        deltas[name] = made.adjust(name, delta.float(), target[name], base[name]).double() \
            if whole else delta
    assert any(not torch.equal(deltas[n], d) for n, d in deltas_of(llama.adapter).items())
    assert_merged(out, added(models.target, (0.5, deltas)))


def test_every_method_is_in_the_family():
    assert set(METHODS) == {"add", "drift-aware", "orthogonal"}


def test_recipes_are_checked_against_the_family():
    options = MergeOptions(adapter="a", target="t", method="orthogonal", options={"rnk": "4"})
    [(location, problem)] = check_family(options)
    assert location == ("method",) and "did you mean 'rank'" in problem
    assert not list(check_family(MergeOptions(adapter="a", target="t", method="orthogonal",
                                              options={"rank": 4})))


# ---- layer weights -------------------------------------------------------------------------------

NAME = "model.layers.{}.mlp.up_proj.weight"


@pytest.mark.parametrize(("value", "expected"), [
    (None, [1, 1, 1, 1, 1]), (0.5, [0.5] * 5), ([1.0], [1] * 5), ([0, 1], [0, 0.25, 0.5, 0.75, 1]),
    ([0, 1, 0], [0, 0.5, 1, 0.5, 0]), ([4, 0, 0, 0], [4, 1, 0, 0, 0])])
def test_lists_lie_over_the_layers(value, expected):
    found = LayerWeights(value)
    assert [found.weight_of(NAME.format(i), 5) for i in range(5)] == pytest.approx(expected)


def test_ends_of_a_list_and_a_single_layer():
    found = LayerWeights([0.25, 0.75])
    assert found.weight_of("model.embed_tokens.weight", 4) == 0.25
    assert found.weight_of("model.norm.weight", 4) == found.weight_of("lm_head.weight", 4) == 0.75
    assert found.weight_of(NAME.format(0), 1) == 0.25


def test_names_go_before_expressions_and_both_before_the_default():
    found = LayerWeights({NAME.format(1): 0.1, "model.layers.2.mlp.up_proj": 0.2, "mlp": 0.3,
                          "default": 0.4})
    assert [found.weight_of(NAME.format(i), 4) for i in range(3)] == [0.3, 0.1, 0.2]
    assert found.weight_of("model.norm.weight", 4) == 0.4
    assert LayerWeights({"mlp": 0.3}).weight_of("model.norm.weight", 4) == 1.0


def test_a_file_holds_the_same(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"schema": 1, "weights": {"mlp": 0.3}, "default": 0.0}))
    found = LayerWeights(path)
    assert (found.weight_of(NAME.format(0), 2), found.weight_of("lm_head.weight", 2)) == (0.3, 0)


@pytest.mark.parametrize(("value", "message"), [
    ([], "empty list"), ({"mlp": "1"}, "is not a finite number"), (float("nan"), "nan"),
    ({"(": 1.0}, "no regular expression"), ([1.0, None], "not a finite number")])
def test_values_that_are_no_weights(value, message):
    with pytest.raises(RecipeError, match=message):
        LayerWeights(value)


def test_files_that_are_no_weights(tmp_path):
    path = tmp_path / "weights.json"
    for data in ({"weights": {}}, {"schema": 2, "weights": {}}, {"schema": 1, "weights": [1]}):
        path.write_text(json.dumps(data))
        with pytest.raises(RecipeError, match="not layer weights of schema 1"):
            LayerWeights(path)


def test_keys_that_fit_nothing_or_twice():
    with pytest.raises(RecipeError, match=r"'q_prj' fit none of the 1 parameters"):
        LayerWeights({"q_prj": 1.0, "mlp": 0.5}).check([NAME.format(0)])
    with pytest.raises(RecipeError, match=r"'mlp' \(0.5\) and 'layers' \(1.0\) both fit"):
        LayerWeights({"mlp": 0.5, "layers": 1.0}).check([NAME.format(0)])


def test_a_merge_weighs_each_layer(llama, tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"schema": 1, "default": 0.0, "weights": {
        "model.layers.0.mlp.up_proj": 0.5, r"layers\.1\.self_attn": -1.0}}))
    out = merge(llama.adapter, llama.models.target, tmp_path / "out", layer_weights=path, weight=2)
    kept = {name: (0.5 if name == NAME.format(0) else -1.0) * delta
            for name, delta in deltas_of(llama.adapter).items()
            if name == NAME.format(0) or "layers.1.self_attn" in name}
    assert_merged(out, added(llama.models.target, (2.0, kept)))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["results"]["modules"] == len(kept) == 5
    assert manifest["inputs"]["layer_weights"]["path"] == str(path)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 3), (5, 2, 3), (0, 3)])
def test_blocks_take_every_row_once(shape, monkeypatch):
    monkeypatch.setattr(total, "_BLOCK_BYTES", 24)
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    blocks = [x[rows] for rows in row_blocks(shape)]
    assert torch.equal(blocks[0] if not shape else torch.cat([*blocks, x[:0]]), x)
