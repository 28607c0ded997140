"""The report of an adapter: its numbers against the checkpoints, its curve against real cuts."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from extend.adapter import adapter_report, cut, extract
from extend.adapter.curve import Spectra
from extend.adapter.report import kind_of
from extend.adapter.report_page import render_page
from extend.adapter.rounding import merge_loss
from extend.adapter_format.peft_files import Adapter
from extend.adapter_format.sidecar import ModuleReport
from extend.checkpoint import Checkpoint
from extend.delta.lowrank import Product
from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.manifest import hash_content
from extend.merge import merge
from tests.adapter_format.tiny_models import edit_json
from tests.page.reader import Page

HOSTILE = '<script>alert("x")</script> & `a`'


def read(path) -> dict:
    return json.loads(path.read_text())


def weights(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def adapter(qwen2, tmp_path_factory) -> Path:
    """Of bf16 models with biases and a tied head."""
    return extract(qwen2.base, qwen2.tuned, tmp_path_factory.mktemp("adapter") / "a", rank=20,
                   exact=True)


@pytest.fixture(scope="module")
def data(adapter) -> dict:
    return read(adapter / "report.json")


def test_modules_against_the_checkpoints(adapter, data, qwen2):
    base, tuned = weights(qwen2.base), weights(qwen2.tuned)
    lora = Adapter(adapter)
    assert data["modules"].keys() == lora.modules.keys()
    for name, entry in data["modules"].items():
        old = base[f"{name}.weight"]
        delta = tuned[f"{name}.weight"].double() - old.double()
        lora_a, lora_b = lora.read_factors(name)
        values = torch.linalg.svdvals(delta)[:20]
        # fp32 factors; the file holds six digits.
        torch.testing.assert_close(torch.tensor(entry["spectrum"]["value"]).double(), values,
                                   rtol=2e-5, atol=1e-8)
        assert entry["spectrum"]["rank"] == list(range(1, 21))
        product = lora_b @ lora_a
        stored = (old.float() + product).bfloat16().float()
        loss = torch.linalg.norm(stored - (old.float() + product)) / torch.linalg.norm(product)
        assert entry["merge_loss"] == pytest.approx(float(loss), rel=1e-4)
        assert entry["relative_norm"] == pytest.approx(
            float(torch.linalg.norm(delta) / torch.linalg.norm(old.double())), rel=1e-5)
        assert entry["layer"] == int(name.split(".")[2])
        assert entry["kind"] == name.split(".")[-1]


def test_everything_else_by_name(data, qwen2):
    base, tuned = weights(qwen2.base), weights(qwen2.tuned)
    rest = set(base) - {f"{name}.weight" for name in data["modules"]}
    assert set(data["tensors"]) == rest
    for name in rest:
        delta = torch.linalg.norm(tuned[name].double() - base[name].double())
        assert data["tensors"][name]["relative_norm"] == pytest.approx(
            float(delta / torch.linalg.norm(base[name].double())), rel=1e-5)
    assert (data["left_out"], data["unchanged"]) == ({}, [])


def test_left_out_and_unchanged_are_named(copies, tmp_path):
    tuned = weights(copies.tuned)
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        tuned[name] = weights(copies.base)[name]
    save_file(tuned, copies.tuned / "model.safetensors", {"format": "pt"})
    out = extract(copies.base, copies.tuned, tmp_path / "a", rank=2, embeddings=False)
    found = read(out / "report.json")
    assert set(found["left_out"]) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert found["unchanged"] == ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    text = "".join(Page((out / "report.html").read_text()).text)
    for name in (*found["left_out"], *found["unchanged"]):
        assert name in text


def test_totals_are_over_all_modules(adapter, data, qwen2):
    base, tuned = weights(qwen2.base), weights(qwen2.tuned)
    lora = Adapter(adapter)
    total = lost = 0.0
    for name in lora.modules:
        delta = tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        lora_a, lora_b = lora.read_factors(name)
        total += float(delta.square().sum())
        lost += float((delta - lora_b.double() @ lora_a.double()).square().sum())
    assert data["totals"]["energy"] == pytest.approx(1 - lost / total, rel=1e-6)
    assert data["totals"]["modules"] == 14 and data["totals"]["ranks"] == [20, 20]
    assert data["adapter"]["adapter_bytes"] == (adapter / "adapter_model.safetensors"
                                                ).stat().st_size


def test_curve_is_what_cuts_keep(adapter, data, tmp_path):
    """The header of a smaller file may be some bytes a tensor shorter than was reckoned."""
    slack = 8 * 28
    for point in data["curve"]["equal_rank"][::3]:
        rank = round(point["mean_rank"])
        out = cut(adapter, tmp_path / f"r{rank}", rank=rank)
        _same(point, out, slack)
    for number, point in enumerate(data["curve"]["threshold"][5::8]):
        out = cut(adapter, tmp_path / f"b{number}", adapter_bytes=point["adapter_bytes"])
        _same(point, out, slack)


def _same(point, out, slack):
    found = read(out / "report.json")["totals"]
    assert found["mean_rank"] == pytest.approx(point["mean_rank"])
    assert found["mean_residual"] == pytest.approx(point["mean_residual"], rel=1e-4)
    assert found["energy"] == pytest.approx(point["energy"], rel=1e-4)
    size = (out / "adapter_model.safetensors").stat().st_size
    assert 0 <= point["adapter_bytes"] - size <= slack


def test_curves_grow_and_one_threshold_keeps_more(data):
    for points in data["curve"].values():
        for key, sign in (("adapter_bytes", 1), ("energy", 1), ("mean_residual", -1)):
            column = [sign * point[key] for point in points]
            assert column == sorted(column)
        assert points[-1]["energy"] == pytest.approx(data["totals"]["energy"])
        assert len(points) <= 40


def test_thresholds_of_a_closed_form():
    """Two modules of values 4, 2 and 3, 1 beside deltas of norm^2 25 and 12."""
    def report(norm, values):
        left = 1 - sum(v * v for v in values) / norm ** 2
        return ModuleReport(shape=(5, 3), rank=2, delta_norm=norm, relative_norm=None,
                            residual=left ** 0.5, energy=1 - left)

    spectra = Spectra({"a": report(5.0, (4, 2)), "b": report(12 ** 0.5, (3, 1))},
                      {"a": torch.tensor([4.0, 2.0]), "b": torch.tensor([3.0, 1.0])}, 4, 100)
    found = [(p.adapter_bytes, p.mean_rank, round(37 * p.energy, 9)) for p in spectra.thresholds()]
    assert found == [(164, 1.0, 25.0), (196, 1.5, 29.0), (228, 2.0, 30.0)]


def test_merge_loss_of_a_large_matrix_is_estimated_from_some_rows(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(2000, 96, generator=generator)).bfloat16()
    save_file({"w": weight}, tmp_path / "model.safetensors")
    product = Product(0.1 * torch.randn(4, 96, generator=generator),
                      0.01 * torch.randn(2000, 4, generator=generator))
    dense = product.lora_b @ product.lora_a
    wanted = weight.float() + dense
    exact = float(torch.linalg.norm(wanted.bfloat16().float() - wanted) / torch.linalg.norm(dense))
    found = merge_loss(Checkpoint(tmp_path), "w", product, float(torch.linalg.norm(dense)), "BF16")
    # 128 of 2000 rows, 12288 errors: the norm of those is known to 1 %.
    assert found == pytest.approx(exact, rel=0.03)
    # Errors of half a unit in the last place, uniform: sigma^2 = ulp^2 / 12.
    ulp = 2.0 ** torch.floor(torch.log2(wanted.abs())) * 2 ** -7
    closed = float((ulp.square().mean() / 12).sqrt() * dense.numel() ** 0.5
                   / torch.linalg.norm(dense))
    assert exact == pytest.approx(closed, rel=0.03)


def test_page_stands_alone_and_names_are_text(data):
    entries = {f"model.layers.0.mlp.{HOSTILE}": next(iter(data["modules"].values()))}
    changed = {**data, "modules": {**data["modules"], **{
        name: {**entry, "kind": HOSTILE} for name, entry in entries.items()}}}
    changed["adapter"] = {**data["adapter"], "base": f"/m/{HOSTILE}"}
    page = Page(render_page(changed))
    assert page.loads == [] and "script" not in page.tags
    assert HOSTILE in "".join(page.text)


def test_page_shows_every_module_and_chart(adapter, data):
    page = Page((adapter / "report.html").read_text())
    text = " ".join("".join(page.text).split())
    assert page.tags.count("svg") == 2 + 5 + 7  # curves, heat maps, spectra of seven kinds
    assert page.tags.count("polyline") == 4 + 14
    assert page.tags.count("rect") == 5 * 14
    assert "14 modules in numbers" in text and "model.embed_tokens.weight" in text


def test_experts_of_a_layer_are_shown_together(data):
    entry = next(iter(data["modules"].values()))
    modules = {f"model.layers.{layer}.mlp.experts.{i}.up_proj": {
        **entry, "layer": layer, "kind": "experts.up_proj", "rank": 2 * i}
        for layer in (0, 1) for i in range(1, 65)}
    page = Page(render_page({**data, "modules": modules}))
    assert page.tags.count("rect") == 5 * 2
    assert "mean of 64" in " ".join("".join(page.text).split())


@pytest.mark.parametrize("name, kind", [
    ("model.layers.3.self_attn.q_proj", "q_proj"),
    ("model.layers.3.mlp.experts.12.up_proj", "experts.up_proj"),
    ("model.layers.3.block_sparse_moe.experts.7.w1", "block_sparse_moe.experts.w1"),
    ("model.language_model.layers.11.mlp.shared_expert.down_proj", "shared_expert.down_proj"),
    ("lm_head", "lm_head")])
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_a_cut_does_not_know_what_a_merge_loses_until_it_has_the_base(adapter, qwen2, tmp_path):
    small = cut(adapter, tmp_path / "cut", rank=3)
    assert read(small / "report.json")["totals"]["merge_loss"] is None
    out = adapter_report(small, tmp_path / "report", base=qwen2.base)
    direct = extract(qwen2.base, qwen2.tuned, tmp_path / "direct", rank=3, exact=True)
    found, expected = read(out / "report.json"), read(direct / "report.json")
    for name, entry in expected["modules"].items():
        assert found["modules"][name]["merge_loss"] == pytest.approx(entry["merge_loss"], rel=1e-3)
    assert not (tmp_path / "cut" / "report.json").samefile(out / "report.json")


def test_report_of_an_adapter_repeats_its_own(adapter, data, tmp_path):
    out = adapter_report(adapter, tmp_path / "report")
    assert read(out / "report.json") == data
    assert (out / "report.html").read_text() == (adapter / "report.html").read_text()


def test_adapter_of_peft_is_measured_against_itself(adapter, qwen2, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, plain / name)
    edit_json(plain / "adapter_config.json", lora_alpha=40)  # a scaling of 2
    out = adapter_report(plain, tmp_path / "report", base=qwen2.base)
    found, ours = read(out / "report.json"), read(adapter / "report.json")
    assert found["totals"]["energy"] == 1 and found["totals"]["mean_residual"] == 0
    for name, entry in found["modules"].items():
        torch.testing.assert_close(
            torch.tensor(entry["spectrum"]["value"]),
            2 * torch.tensor(ours["modules"][name]["spectrum"]["value"]), rtol=1e-4, atol=1e-7)
        assert entry["merge_loss"] < ours["modules"][name]["merge_loss"]
    assert "has no sidecar" in "".join(Page((out / "report.html").read_text()).text)


def write_results(directory, model, adapter=None, score=1.0) -> Path:
    """What `eval` would write of a model."""
    entry = {"score": score, "n": 10, "wilson_low": max(0.0, score - 0.2),
             "wilson_high": min(1.0, score + 0.1)}
    record = None if adapter is None else {"path": str(adapter), "sha256": hash_content(adapter)}
    directory.mkdir()
    (directory / "results.json").write_text(json.dumps({
        "schema": 1, "rows": [], "model": {"path": str(model), "adapter": record},
        "summary": {"tasks": {"passkey": {"lengths": {"8192": entry, "32768": entry}}},
                    "skills": {"skill": entry}, "losses": {"prose": {"loss": 2.0 + score}}}}))
    return directory


@pytest.fixture(scope="module")
def trials(adapter, qwen2, tmp_path_factory):
    root = tmp_path_factory.mktemp("trials")
    r2, r8 = (cut(adapter, root / f"r{rank}", rank=rank) for rank in (2, 8))
    merged = merge(r8, qwen2.base, root / "merged", weight=0.5)
    results = {"long": write_results(root / "long", qwen2.tuned, score=0.9),
               "merged": write_results(root / "r8-results", merged, score=0.8),
               "beside": write_results(root / "r2-results", qwen2.base, r2, score=0.4)}
    return SimpleNamespace(root=root, r2=r2, r8=r8, results=results)


def test_measured_quality_stands_at_the_size_of_the_adapter(adapter, trials, tmp_path):
    out = adapter_report(adapter, tmp_path / "report", results=trials.results)
    measured = read(out / "report.json")["measured"]
    assert [(m["label"], m["rank"], m["weight"]) for m in measured] == [
        ("beside", 2, 1.0), ("merged", 8, 0.5), ("long", None, 1.0)]
    assert [m["adapter_bytes"] for m in measured] == [
        (d / "adapter_model.safetensors").stat().st_size for d in (trials.r2, trials.r8)] + [None]
    assert measured[0]["scores"][0] == {"task": "passkey", "length": 8192, "score": 0.4, "n": 10,
                                        "wilson_low": 0.2, "wilson_high": 0.5}
    assert measured[1]["losses"] == {"prose": 2.8}
    page = Page((out / "report.html").read_text())
    text = " ".join("".join(page.text).split())
    assert "rank 8, " in text and "weight 0.5" in text and "no adapter" in text
    assert "40 %4/10; 20-50" in text and "merged: 80 % (8/10; 60-90)" in text
    assert page.tags.count("svg") == 14 + 2  # passkey, skills
    manifest = read(out / "manifest.json")
    assert set(manifest["inputs"]) == {"adapter", "results.beside", "results.merged",
                                       "results.long"}


def test_results_must_tell_their_adapter(adapter, trials, qwen2, tmp_path):
    def refused(message, results):
        with pytest.raises(CheckpointError, match=message):
            adapter_report(adapter, tmp_path / "report", results={"x": results})
        assert not (tmp_path / "report").exists()

    refused("is of the model .*gone, which is not there",
            write_results(tmp_path / "a", tmp_path / "gone"))
    lost = shutil.copytree(trials.r2, tmp_path / "lost")
    results = write_results(tmp_path / "b", qwen2.base, lost)
    edit_json(lost / "adapter_config.json", r=2, lora_alpha=4)
    refused("what is there now is of", results)
    shutil.rmtree(lost)
    refused("which is not there; its size is needed", results)
    refused("no such file", tmp_path / "nothing")


def test_results_of_several_deltas_have_no_size(adapter, trials, qwen2, tmp_path):
    both = merge([trials.r2, trials.r8], qwen2.base, tmp_path / "both", weight=[0.5, 0.5])
    with pytest.raises(CheckpointError, match=r"adapter\.0, adapter\.1 were merged"):
        adapter_report(adapter, tmp_path / "report",
                       results={"x": write_results(tmp_path / "results", both)})


def test_what_else_an_adapter_file_holds_is_named(adapter, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(adapter / "adapter_config.json", plain)
    edit_json(plain / "adapter_config.json", modules_to_save=["norm"])
    factors = load_file(adapter / "adapter_model.safetensors")
    factors["base_model.model.model.norm.weight"] = torch.ones(64)
    save_file(factors, plain / "adapter_model.safetensors")
    out = adapter_report(plain, tmp_path / "report")
    assert read(out / "report.json")["beside"] == ["model.norm.weight"]
    assert "model.norm.weight" in "".join(Page((out / "report.html").read_text()).text)


def test_refuses_a_base_of_another_shape(adapter, llama, tmp_path):
    with pytest.raises(CompatibilityError, match="in the adapter but"):
        other = shutil.copytree(llama.base, tmp_path / "other")
        tensors = weights(other)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        adapter_report(adapter, tmp_path / "report", base=other)


def test_refuses_to_write_into_the_adapter(adapter):
    with pytest.raises(RecipeError, match="lie in one another"):
        adapter_report(adapter, adapter / "report")
