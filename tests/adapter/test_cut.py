"""The stage `cut`: against extractions at the smaller rank, and against PEFT."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from extend.adapter import cut, extract
from extend.adapter_format.peft_files import Adapter
from extend.adapter_format.serving_files import adapter_serving, write_serving
from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.merge import merge
from tests.adapter_format.tiny_models import build, edit_json

PREFIX = "base_model.model."


def products(directory) -> dict[str, torch.Tensor]:
    adapter = Adapter(directory)
    return {name: module.scaling * (b.double() @ a.double())
            for name, module in adapter.modules.items() for a, b in [adapter.read_factors(name)]}


def reports(directory) -> dict[str, dict]:
    return json.loads((directory / "extend_sidecar.json").read_text())["modules"]


def deltas(models) -> dict[str, torch.Tensor]:
    base = load_file(models.base / "model.safetensors")
    tuned = load_file(models.tuned / "model.safetensors")
    return {name.removesuffix(".weight"): tuned[name].double() - base[name].double()
            for name in base}


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    return extract(llama.base, llama.tuned, tmp_path_factory.mktemp("whole") / "a", rank=24,
                   exact=True)


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory):
    """What PEFT wrote: two ranks, a scaling of its own, some layers only. And its deltas."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=6, lora_alpha=9, use_rslora=True, target_modules=["q_proj", "down_proj"],
                        rank_pattern={"layers.1.mlp.down_proj": 4}, task_type="CAUSAL_LM",
                        alpha_pattern={"layers.1.mlp.down_proj": 3})
    model = get_peft_model(build("llama"), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    directory = tmp_path_factory.mktemp("peft") / "a"
    model.save_pretrained(directory)
    found = {name.removeprefix(PREFIX): module.get_delta_weight("default").detach().double()
             for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return directory, found


def nearest(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_equals_an_extraction_at_that_rank(whole, llama, tmp_path, rank):
    small = cut(whole, tmp_path / "cut", rank=rank)
    direct = extract(llama.base, llama.tuned, tmp_path / "direct", rank=rank, exact=True)
    found, expected = products(small), products(direct)
    assert found.keys() == expected.keys()
    for name in expected:
        # Both hold fp32 factors of the same singular triples.
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-7)
    for name, report in reports(direct).items():
        mine = reports(small)[name]
        assert mine["rank"] == report["rank"] == rank
        assert mine["residual"] == pytest.approx(report["residual"], rel=1e-5)
        assert mine["energy"] == pytest.approx(report["energy"], rel=1e-5)
        rest = ("shape", "delta_norm", "relative_norm", "noise_edge", "noise_share")
        assert {k: mine[k] for k in rest} == {k: report[k] for k in rest}


def test_of_sketches_is_within_their_tolerance(llama, tmp_path):
    large = extract(llama.base, llama.tuned, tmp_path / "large", rank=12)
    small = cut(large, tmp_path / "small", rank=4)
    found = products(small)
    for name, delta in deltas(llama).items():
        if name in found:
            best = torch.linalg.norm(delta - nearest(delta, 4))
            # Half a percent is what the sketches promise.
            assert torch.linalg.norm(delta - found[name]) <= 1.005 * best
            assert reports(small)[name]["residual"] == pytest.approx(
                float(torch.linalg.norm(delta - found[name]) / torch.linalg.norm(delta)), rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_residual_counts_the_rounding_of_the_factors(whole, llama, tmp_path, dtype):
    small = cut(whole, tmp_path / "cut", rank=20, dtype=dtype)
    assert {t.dtype for t in load_file(small / "adapter_model.safetensors").values()} == {
        getattr(torch, dtype)}
    found, expected = products(small), deltas(llama)
    for name, report in reports(small).items():
        delta = expected[name]
        residual = float(torch.linalg.norm(delta - found[name]) / torch.linalg.norm(delta))
        # The rounding errors are not quite orthogonal to what was left out.
        assert report["residual"] == pytest.approx(residual, rel=1e-3)


def test_the_rest_of_the_adapter_is_carried_over(whole, tmp_path):
    source = shutil.copytree(whole, tmp_path / "source")
    (source / "extend_lineage.safetensors").write_bytes(b"a sample")
    small = cut(source, tmp_path / "cut", rank=3)
    assert {f.name for f in small.iterdir()} == {f.name for f in source.iterdir()}
    for name in ("extend_sidecar.safetensors", "extend_lineage.safetensors"):
        assert (small / name).read_bytes() == (source / name).read_bytes()
    before, after = (json.loads((d / "extend_sidecar.json").read_text()) for d in (source, small))
    assert {k: v for k, v in after.items() if k not in ("modules", "extraction")} == {
        k: v for k, v in before.items() if k not in ("modules", "extraction")}
    assert after["extraction"].pop("cut")["rank"] == 3
    assert after["extraction"] == before["extraction"]
    manifest = json.loads((small / "manifest.json").read_text())
    assert (manifest["stage"], manifest["results"]["max_rank"]) == ("cut", 3)
    config = json.loads((small / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})


def test_serving_files_are_those_of_the_smaller_rank(whole, tmp_path):
    source = shutil.copytree(whole, tmp_path / "source")
    write_serving(source, adapter_serving(source, notes=["a note"]))
    small = cut(source, tmp_path / "cut", rank=3)
    found, before = (json.loads((d / "serving.json").read_text()) for d in (small, source))
    ranks = [d["engines"]["vllm"]["command"][-2:] for d in (before, found)]
    assert ranks == [["--max-lora-rank", "32"], ["--max-lora-rank", "8"]]
    assert found["notes"] == ["a note"] and found["rope_override"] == before["rope_override"]
    assert "--max-lora-rank 8" in (small / "SERVING.md").read_text()


def test_merges_like_any_other(whole, llama, tmp_path):
    small = cut(whole, tmp_path / "cut", rank=5)
    out = merge(small, llama.base, tmp_path / "merged")
    merged, base = (load_file(d / "model.safetensors") for d in (out, llama.base))
    for name, product in products(small).items():
        weight = f"{name}.weight"
        torch.testing.assert_close(merged[weight].double(), base[weight].double() + product,
                                   rtol=1e-6, atol=1e-7)


def test_cutting_twice_is_cutting_once(whole, tmp_path):
    twice = cut(cut(whole, tmp_path / "a", rank=9), tmp_path / "b", rank=4)
    once = cut(whole, tmp_path / "c", rank=4)
    expected = products(once)
    for name, product in products(twice).items():
        torch.testing.assert_close(product, expected[name], rtol=1e-4, atol=2e-7)
    for name, report in reports(once).items():
        assert reports(twice)[name]["residual"] == pytest.approx(report["residual"], rel=1e-6)


def test_peft_adapter_becomes_the_nearest_of_that_rank(trained, tmp_path):
    from peft import PeftModel

    directory, expected = trained
    small = cut(directory, tmp_path / "cut", rank=2)
    model = PeftModel.from_pretrained(build("llama"), small)
    found = {name.removeprefix(PREFIX): module.get_delta_weight("default").detach().double()
             for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], nearest(delta, 2), rtol=1e-4, atol=1e-6)
    assert not (small / "extend_sidecar.json").exists()
    assert json.loads((small / "adapter_config.json").read_text())["use_rslora"] is False


def test_modules_of_smaller_rank_keep_it(trained, tmp_path):
    directory, expected = trained
    found = products(cut(directory, tmp_path / "cut", rank=5))
    ranks = {name: m.rank for name, m in Adapter(tmp_path / "cut").modules.items()}
    assert set(ranks.values()) == {4, 5}
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], nearest(delta, ranks[name]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_energy_is_reached_with_the_fewest_ranks(trained, tmp_path, energy):
    directory, expected = trained
    cut(directory, tmp_path / "cut", energy=energy)
    ranks = {name: m.rank for name, m in Adapter(tmp_path / "cut").modules.items()}
    for name, delta in expected.items():
        squares = torch.linalg.svdvals(delta).square()
        share = squares.cumsum(0) / squares.sum()
        assert share[ranks[name] - 1] >= energy - 1e-12
        assert ranks[name] == 1 or share[ranks[name] - 2] < energy


def test_bytes_are_spent_where_values_are_largest(whole, tmp_path):
    budget = 60_000
    small = cut(whole, tmp_path / "cut", adapter_bytes=budget)
    size = (small / "adapter_model.safetensors").stat().st_size
    largest = max(4 * sum(product.shape) for product in products(whole).values())
    assert budget - largest - 200 < size <= budget
    ranks = {name: m.rank for name, m in Adapter(small).modules.items()}
    assert len(set(ranks.values())) > 1
    values = {name: torch.linalg.svdvals(p) for name, p in products(whole).items()}
    kept = min(float(values[n][r - 1]) for n, r in ranks.items() if r > 1)
    dropped = max(float(values[n][r]) for n, r in ranks.items() if r < 24)
    # One value may not fit any more where a smaller module's, just below it, does.
    assert dropped < 1.1 * kept


def test_same_call_gives_the_same_files(whole, tmp_path):
    for name in ("a", "b"):
        cut(whole, tmp_path / name, rank=7)
    for file in (tmp_path / "a").iterdir():
        if file.name != "manifest.json":
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("options, message", [
    ({}, "no size is given"),
    ({"rank": 3, "energy": 0.5}, "rank is 3 and energy is 0.5; give one"),
    ({"rank": 0}, "rank is 0"), ({"energy": 1.5}, "energy is 1.5"),
    ({"rank": 25}, r"rank is 25, but .* holds rank 24 at most"),
    ({"adapter_bytes": 5000}, "adapter_bytes leaves"),
    ({"rank": 3, "dtype": "int8"}, "dtype"),
])
def test_refuses_sizes_that_mean_nothing(whole, tmp_path, options, message):
    with pytest.raises(RecipeError, match=message):
        cut(whole, tmp_path / "cut", **options)
    assert list(tmp_path.iterdir()) == []


def test_refuses_to_write_into_the_adapter(whole):
    with pytest.raises(RecipeError, match="lie in one another"):
        cut(whole, whole, rank=3, overwrite=True)


def test_refuses_what_it_would_lose(trained, tmp_path):
    source = shutil.copytree(trained[0], tmp_path / "source")
    factors = load_file(source / "adapter_model.safetensors")
    factors[f"{PREFIX}model.norm.weight"] = torch.ones(64)
    save_file(factors, source / "adapter_model.safetensors")
    edit_json(source / "adapter_config.json", modules_to_save=["norm"])
    with pytest.raises(CompatibilityError, match="holds model.norm.weight, which cut does not"):
        cut(source, tmp_path / "cut", rank=3)


@pytest.mark.parametrize("value, dtype, message", [
    (float("nan"), None, "hold infinite or NaN"),
    (1e12, "float16", "overflow"),
])
def test_refuses_factors_that_are_no_numbers(trained, tmp_path, value, dtype, message):
    source = shutil.copytree(trained[0], tmp_path / "source")
    factors = load_file(source / "adapter_model.safetensors")
    next(iter(factors.values()))[0, 0] = value
    save_file(factors, source / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        cut(source, tmp_path / "cut", rank=3, dtype=dtype)
    assert not (tmp_path / "cut").exists()
