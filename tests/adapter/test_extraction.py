"""The rules of rank in whole adapters, and extractions that are interrupted and go on."""

import hashlib
import json
import math
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from extend.adapter import extract
from extend.adapter.extraction import Extraction
from extend.adapter.rank import RankRule
from extend.errors import CheckpointError, RecipeError, SpaceError
from tests.adapter_format.tiny_models import LINEAR, Models


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def linear_deltas(models: Models) -> dict[str, torch.Tensor]:
    """module -> tuned - base in fp64."""
    base, tuned = (load_file(d / "model.safetensors") for d in (models.base, models.tuned))
    return {name.removesuffix(".weight"): tuned[name].double() - base[name].double()
            for name in base if name.split(".")[-2] in LINEAR and name.endswith("weight")}


def product(factors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    return (factors[f"base_model.model.{module}.lora_B.weight"].double()
            @ factors[f"base_model.model.{module}.lora_A.weight"].double())


def hashes(out: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in out.iterdir() if file.name != "manifest.json"}


@pytest.fixture(scope="module")
def rounded(llama, tmp_path_factory) -> tuple[Models, dict[str, torch.Tensor]]:
    """Base in bf16; tuned is base plus four ranks, rounded to bf16. And tuned before rounding.

    Weights are independent and of one size, for which the edge is sharp.
    """
    root = tmp_path_factory.mktemp("rounded")
    for name in ("base", "tuned"):
        shutil.copytree(getattr(llama, name), root / name)
    generator, trained = torch.Generator().manual_seed(3), {}
    base = {n: (0.02 * torch.randn(t.shape, generator=generator)).bfloat16()
            for n, t in sorted(load_file(llama.base / "model.safetensors").items())}
    for name, weight in sorted(base.items()):
        trained[name] = weight.double()
        if name.split(".")[-2] in LINEAR:
            left = torch.randn(weight.shape[0], 4, generator=generator, dtype=torch.float64)
            right = torch.randn(4, weight.shape[1], generator=generator, dtype=torch.float64)
            trained[name] += 1e-3 * left @ right
    save_file(base, root / "base" / "model.safetensors", metadata={"format": "pt"})
    save_file({n: t.bfloat16() for n, t in trained.items()}, root / "tuned" / "model.safetensors",
              metadata={"format": "pt"})
    return Models(base=root / "base", tuned=root / "tuned", target=llama.target), trained


def bf16_variance(*weights: torch.Tensor) -> float:
    """mean(ulp^2) / 12 by the exponents of the values: 8 bits of significand."""
    exponents = torch.cat([torch.frexp(w.double().abs()).exponent.flatten() for w in weights])
    return float((2.0 ** (exponents.double() - 8)).square().mean()) / 12


def test_default_ranks_are_those_above_the_rounding_noise(rounded, tmp_path):
    models, trained = rounded
    out = extract(models.base, models.tuned, tmp_path / "a")
    base, tuned = (load_file(d / "model.safetensors") for d in (models.base, models.tuned))
    modules = read(out / "extend_sidecar.json")["modules"]
    assert len(modules) == 14
    for module, delta in linear_deltas(models).items():
        name, report = f"{module}.weight", modules[module]
        variance = bf16_variance(base[name], tuned[name])
        edge = math.sqrt(variance) * sum(math.sqrt(n) for n in delta.shape)
        assert report["noise_edge"] == pytest.approx(edge, rel=1e-9)
        assert report["rank"] == int((torch.linalg.svdvals(delta) > edge).sum())
        assert 4 <= report["rank"] <= 5  # at these sizes, noise may overshoot its edge once
        found = float((tuned[name].double() - trained[name]).square().sum())
        norm = float(torch.linalg.norm(delta)) ** 2
        assert report["noise_share"] == pytest.approx(variance * delta.numel() / norm, rel=1e-6)
        # The errors of some 2000 weights, predicted from their exponents alone.
        assert report["noise_share"] * norm == pytest.approx(found, rel=0.15)


def test_other_rules_report_the_noise_too(rounded, tmp_path):
    models, _ = rounded
    default, fixed = (read(extract(models.base, models.tuned, tmp_path / name, **options)
                           / "extend_sidecar.json")["modules"]
                      for name, options in (("a", {}), ("b", {"rank": 9})))
    for module, report in fixed.items():
        assert report["rank"] == 9
        assert report["noise_edge"] == default[module]["noise_edge"]
        assert report["noise_share"] == default[module]["noise_share"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_bytes", [20_000, 47_111, 120_000])
def test_budget_is_kept_and_spent_where_values_are_largest(llama, tmp_path, num_bytes, dtype):
    out = extract(llama.base, llama.tuned, tmp_path / "a", adapter_bytes=num_bytes, dtype=dtype)
    size = (out / "adapter_model.safetensors").stat().st_size
    widest = 4 * (64 + 96)
    assert size <= num_bytes
    assert size > num_bytes - widest - 400 or num_bytes == 120_000  # which holds full ranks in bf16
    modules, deltas = read(out / "extend_sidecar.json")["modules"], linear_deltas(llama)
    factors = load_file(out / "adapter_model.safetensors")
    kept, left = [], [0.0]
    for module, delta in deltas.items():
        rank, values = modules[module]["rank"], torch.linalg.svdvals(delta)
        kept += [float(v) for v in values[1:rank]]
        left += [float(v) for v in values[rank:]]
        norm = torch.linalg.norm(delta)
        residual = float(torch.linalg.norm(delta - product(factors, module)) / norm)
        assert modules[module]["residual"] == pytest.approx(residual, rel=1e-4, abs=1e-6)
        assert modules[module]["energy"] == pytest.approx(
            float(values[:rank].square().sum() / norm ** 2), rel=1e-5)
    assert min(kept) >= max(left) * (1 - 1e-5)  # fp32 singular values


def test_budget_looks_further_where_one_module_needs_it(copies, tmp_path):
    """One delta is a thousand times the others, so it takes every rank beyond their first."""
    base, tuned = (load_file(d / "model.safetensors") for d in (copies.base, copies.tuned))
    name = "model.layers.1.mlp.up_proj"
    tuned[f"{name}.weight"] = base[f"{name}.weight"] + 1000 * (
        tuned[f"{name}.weight"] - base[f"{name}.weight"])
    save_file(tuned, copies.tuned / "model.safetensors", metadata={"format": "pt"})
    seen = []
    original = Extraction._factorize

    def counting(self, matrix, found):
        seen.append((matrix.name, matrix.at_rank))
        return original(self, matrix, found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extraction, "_factorize", counting)
        out = extract(copies.base, copies.tuned, tmp_path / "a", adapter_bytes=35_000)
    ranks = {m: r["rank"] for m, r in read(out / "extend_sidecar.json")["modules"].items()}
    assert ranks.pop(name) > 20
    assert set(ranks.values()) == {1}
    assert [parameter for parameter, _ in seen[14:]] == [f"{name}.weight"] * len(seen[14:])
    assert [at_rank for _, at_rank in seen[14:]][:2] == [16, 32]  # it was looked at to rank 8


def test_budget_below_rank_one_is_refused(llama, tmp_path):
    with pytest.raises(RecipeError, match=r"adapter_bytes leaves .*rank 1 of 14 modules takes"):
        extract(llama.base, llama.tuned, tmp_path / "a", adapter_bytes=8_000)
    assert not list(tmp_path.iterdir())


def test_exact_does_not_sketch(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("extend.delta.svd._Krylov", None)
    out = extract(llama.base, llama.tuned, tmp_path / "a", rank=3, exact=True)
    factors = load_file(out / "adapter_model.safetensors")
    for module, delta in linear_deltas(llama).items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        expected = (u[:, :3] * s[:3]) @ vh[:3]
        # fp32 factors of singular values up to s[0]
        torch.testing.assert_close(product(factors, module), expected, rtol=0,
                                   atol=1e-6 * float(s[0]))


def interrupt_at(count: int, error: BaseException) -> tuple[list[str], object]:
    """A `_factorize` that fails at its call number `count`, and the names it did before."""
    done: list[str] = []
    original = Extraction._factorize

    def factorize(self, matrix, found):
        if len(done) == count:
            raise error
        report = original(self, matrix, found)
        done.append(matrix.name)
        return report
    return done, factorize


@pytest.fixture
def interrupted(llama, tmp_path) -> tuple[Path, list[str]]:
    """The place of an adapter whose extraction was stopped after five modules, and their names."""
    done, factorize = interrupt_at(5, KeyboardInterrupt())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Extraction, "_factorize", factorize)
        extract(llama.base, llama.tuned, tmp_path / "a", rank=6)
    return tmp_path / "a", done


def go_on(models: Models, out: Path, **options) -> list[str]:
    """Extract again; return what was factorized."""
    done, factorize = interrupt_at(-1, KeyboardInterrupt())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extraction, "_factorize", factorize)
        extract(models.base, models.tuned, out, **options)
    return done


def test_interruption_leaves_no_output_but_finished_parts(interrupted):
    out, done = interrupted
    assert [path.name for path in out.parent.iterdir()] == [".a.parts"]
    assert {path.name for path in (out.parent / ".a.parts").iterdir()} == {
        "fingerprint.json", *(f"{name}.safetensors" for name in done)}


def test_the_same_call_goes_on(interrupted, llama, tmp_path, caplog):
    out, done = interrupted
    with caplog.at_level("INFO", logger="extend"):
        rest = go_on(llama, out, rank=6)
    assert len(rest) == 9
    assert not set(rest) & set(done)
    assert "5 of 14 matrices are done" in caplog.text
    whole = extract(llama.base, llama.tuned, tmp_path / "whole", rank=6)
    assert hashes(out) == hashes(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "whole"]


@pytest.mark.parametrize("options", [{"rank": 5}, {"rank": 6, "seed": 1},
                                     {"rank": 6, "dtype": "bfloat16"}])
def test_another_call_starts_over(interrupted, llama, options):
    out, _ = interrupted
    assert len(go_on(llama, out, **options)) == 14


def test_other_weights_start_over(interrupted, llama, copies):
    out, _ = interrupted
    tensors = load_file(copies.tuned / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, copies.tuned / "model.safetensors", metadata={"format": "pt"})
    assert len(go_on(copies, out, rank=6)) == 14


def test_a_damaged_part_is_made_again(interrupted, llama, tmp_path):
    out, done = interrupted
    part = out.parent / ".a.parts" / f"{done[2]}.safetensors"
    part.write_bytes(part.read_bytes()[:-7])
    rest = go_on(llama, out, rank=6)
    assert len(rest) == 10
    assert done[2] in rest
    assert hashes(out) == hashes(extract(llama.base, llama.tuned, tmp_path / "whole", rank=6))


def test_a_budget_goes_on_where_it_looks_further(copies, tmp_path):
    base, tuned = (load_file(d / "model.safetensors") for d in (copies.base, copies.tuned))
    name = "model.layers.1.mlp.up_proj.weight"
    tuned[name] = base[name] + 1000 * (tuned[name] - base[name])
    save_file(tuned, copies.tuned / "model.safetensors", metadata={"format": "pt"})
    options = {"adapter_bytes": 35_000}
    whole = extract(copies.base, copies.tuned, tmp_path / "whole", **options)
    _, factorize = interrupt_at(15, KeyboardInterrupt())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Extraction, "_factorize", factorize)
        extract(copies.base, copies.tuned, tmp_path / "a", **options)
    assert set(go_on(copies, tmp_path / "a", **options)) == {name}
    assert hashes(tmp_path / "a") == hashes(whole)


def test_unchanged_weights_are_known_after_an_interruption(copies, tmp_path):
    base, tuned = (load_file(d / "model.safetensors") for d in (copies.base, copies.tuned))
    name = "model.layers.0.mlp.down_proj.weight"  # the first of all
    save_file({**tuned, name: base[name]}, copies.tuned / "model.safetensors",
              metadata={"format": "pt"})
    _, factorize = interrupt_at(3, KeyboardInterrupt())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Extraction, "_factorize", factorize)
        extract(copies.base, copies.tuned, tmp_path / "a", rank=6)
    assert len(go_on(copies, tmp_path / "a", rank=6)) == 11
    sidecar = read(tmp_path / "a" / "extend_sidecar.json")
    assert sidecar["unchanged"] == [name]
    assert len(sidecar["modules"]) == 13


def fail_at(count: int, error: Exception, models: Models, out: Path) -> list[str]:
    """Extract with an error after `count` modules; return their names."""
    done, factorize = interrupt_at(count, error)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(
            CheckpointError, match="no space left on the device|only 7 bytes"):
        patch.setattr(Extraction, "_factorize", factorize)
        extract(models.base, models.tuned, out, rank=6)
    return done


def test_an_error_that_is_reported_leaves_nothing(llama, tmp_path):
    fail_at(3, CheckpointError("only 7 bytes are right"), llama, tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   SpaceError("only 7 bytes are free")])
def test_a_full_disk_loses_nothing_that_is_done(llama, tmp_path, caplog, error):
    done = fail_at(3, error, llama, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == [".a.parts"]
    assert f"kept in {tmp_path / '.a.parts'}" in caplog.text
    rest = go_on(llama, tmp_path / "a", rank=6)
    assert len(rest) == 11
    assert not set(rest) & set(done)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_interruption_while_files_are_joined_loses_nothing(llama, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("extend.adapter.extraction.stream_adapter", stop)
        extract(llama.base, llama.tuned, tmp_path / "a", rank=6)
    assert not go_on(llama, tmp_path / "a", rank=6)


def test_factors_do_not_pile_up_in_memory(llama, tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    most = []
    original = RankRule.factorize

    def counting(self, *arguments):
        most.append(sum(ref() is not None for ref in alive))
        found = original(self, *arguments)
        alive.append(weakref.ref(found.lora_a))
        return found
    monkeypatch.setattr(RankRule, "factorize", counting)
    extract(llama.base, llama.tuned, tmp_path / "a", rank=6)
    assert most == [0] * 14
