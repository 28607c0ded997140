"""Experts stored in one tensor: a tiny mixture of experts, its factors, and what is reported."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from extend.adapter import extract
from extend.adapter_format.peft_files import Adapter
from extend.errors import CheckpointError
from extend.merge import merge

EXPERTS, ROWS, COLUMNS = 5, 48, 64
UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"
SAME = "model.layers.1.mlp.experts.gate_up_proj"
BIAS = "model.layers.0.mlp.experts.gate_up_proj_bias"
ROUTER = "model.layers.0.mlp.router.weight"


@pytest.fixture(scope="module")
def mixture(llama, tmp_path_factory):
    """The Llama models with experts beside their own weights: base and tuned.

    In UP, expert `e` moved along `e` directions, so that the first did not move.
    """
    root, generator = tmp_path_factory.mktemp("mixture"), torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in {
        UP: (EXPERTS, ROWS, COLUMNS), DOWN: (EXPERTS, COLUMNS, ROWS), SAME: (2, 8, 8),
        BIAS: (EXPERTS, ROWS), ROUTER: (EXPERTS, COLUMNS)}.items()}
    move = {name: 0.1 * torch.randn(base[name].shape, generator=generator)
            for name in (DOWN, BIAS, ROUTER)}
    move[UP] = torch.stack([torch.randn(ROWS, e, generator=generator)
                            @ torch.randn(e, COLUMNS, generator=generator)
                            for e in range(EXPERTS)])
    tuned = {name: x + move.get(name, 0) for name, x in base.items()}
    for name, more in (("base", base), ("tuned", tuned)):
        shutil.copytree(getattr(llama, name), root / name)
        weights = load_file(root / name / "model.safetensors")
        save_file({**weights, **more}, root / name / "model.safetensors", metadata={"format": "pt"})
    return root, {name: tuned[name] - base[name] for name in base}


def product(out, name: str) -> torch.Tensor:
    side = load_file(out / "extend_sidecar.safetensors")
    return side[f"{name}.lora_B"].float() @ side[f"{name}.lora_A"].float()


@pytest.fixture(scope="module")
def adapter(mixture, tmp_path_factory):
    return extract(mixture[0] / "base", mixture[0] / "tuned",
                   tmp_path_factory.mktemp("out") / "a", rank=48)


@pytest.mark.parametrize("name", [UP, DOWN])
def test_full_rank_gives_every_expert_back(mixture, adapter, name):
    # fp32 products of up to 48 numbers of size one
    torch.testing.assert_close(product(adapter, name), mixture[1][name], rtol=0, atol=2e-5)


def test_each_expert_gets_the_best_of_its_rank(mixture, tmp_path):
    out = extract(mixture[0] / "base", mixture[0] / "tuned", tmp_path / "a", rank=3)
    found, deltas = product(out, DOWN), mixture[1][DOWN].double()
    u, s, vh = torch.linalg.svd(deltas, full_matrices=False)
    expected = (u[..., :3] * s[:, None, :3]) @ vh[:, :3]
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)
    report = json.loads((out / "extend_sidecar.json").read_text())["experts"][DOWN]
    left = [float(torch.linalg.norm(d - f.double())) for d, f in zip(deltas, found, strict=True)]
    norms = [float(torch.linalg.norm(d)) for d in deltas]
    whole = float(torch.linalg.norm(deltas))
    assert report["shape"] == [EXPERTS, COLUMNS, ROWS]
    assert report["rank"] == 3
    assert report["ranks"] == [3] * EXPERTS
    assert report["delta_norm"] == pytest.approx(whole, rel=1e-6)
    assert report["residual"] == pytest.approx(sum(x * x for x in left) ** 0.5 / whole, rel=1e-5)
    assert report["max_residual"] == pytest.approx(
        max(x / n for x, n in zip(left, norms, strict=True)), rel=1e-5)


def test_experts_of_lower_rank_are_filled_up_with_zeros(mixture, tmp_path):
    out = extract(mixture[0] / "base", mixture[0] / "tuned", tmp_path / "a", energy=0.999999)
    report = json.loads((out / "extend_sidecar.json").read_text())["experts"][UP]
    assert report["ranks"] == [0, 1, 2, 3, 4]
    side = load_file(out / "extend_sidecar.safetensors")
    assert side[f"{UP}.lora_A"].shape == (EXPERTS, 4, COLUMNS)
    assert side[f"{UP}.lora_B"].shape == (EXPERTS, ROWS, 4)
    for expert in range(EXPERTS):
        assert not bool(side[f"{UP}.lora_A"][expert, expert:].any())
        assert not bool(side[f"{UP}.lora_B"][expert, :, expert:].any())
    torch.testing.assert_close(product(out, UP), mixture[1][UP], rtol=0, atol=0.01)


def test_the_rest_is_whole_in_the_sidecar_and_the_adapter_holds_none_of_it(mixture, adapter):
    side = load_file(adapter / "extend_sidecar.safetensors")
    for name in (BIAS, ROUTER):
        torch.testing.assert_close(side[name], mixture[1][name], rtol=0, atol=0)
    assert not [key for key in load_file(adapter / "adapter_model.safetensors") if "mlp.exp" in key]
    sidecar = json.loads((adapter / "extend_sidecar.json").read_text())
    assert sorted(sidecar["experts"]) == [UP, DOWN]
    assert SAME in sidecar["unchanged"]
    manifest = json.loads((adapter / "manifest.json").read_text())
    assert manifest["results"]["sidecar_experts"] == 2


def test_factors_are_read(mixture, adapter):
    lora_a, lora_b = Adapter(adapter).read_expert_factors(DOWN)
    torch.testing.assert_close(lora_b @ lora_a, mixture[1][DOWN], rtol=0, atol=2e-5)


def test_merging_it_into_the_base_gives_the_tuned_model(mixture, adapter, tmp_path):
    out = merge(adapter, mixture[0] / "base", tmp_path / "merged")
    found, tuned = (load_file(d / "model.safetensors") for d in (out, mixture[0] / "tuned"))
    assert set(found) == set(tuned)
    for name in (UP, DOWN, SAME, BIAS, ROUTER):
        torch.testing.assert_close(found[name], tuned[name], rtol=0, atol=2e-5, msg=name)


def test_a_sidecar_of_another_extraction_is_refused(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "a")
    side = load_file(tmp_path / "a" / "extend_sidecar.safetensors")
    side[f"{UP}.lora_A"] = side[f"{UP}.lora_A"][:, :2].contiguous()
    save_file(side, tmp_path / "a" / "extend_sidecar.safetensors")
    with pytest.raises(CheckpointError, match=rf"{UP}\.lora_A is \(5, 2, 64\) in extend_sidecar"):
        Adapter(tmp_path / "a")


@pytest.mark.parametrize("device", ["cpu,cpu"])
def test_devices_do_not_change_a_byte(mixture, adapter, tmp_path, device):
    out = extract(mixture[0] / "base", mixture[0] / "tuned", tmp_path / "a", rank=48, device=device)
    name = "extend_sidecar.safetensors"
    assert (out / name).read_bytes() == (adapter / name).read_bytes()
