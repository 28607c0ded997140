"""The base's sample: what it holds, and its estimates against the whole measurement."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from extend.adapter_format.sidecar import parameter_infos
from extend.checkpoint import Checkpoint, read_header
from extend.delta.lineage import compare
from extend.delta.sample import (
    SAMPLE_NAME,
    compare_with_sample,
    positions,
    read_sample,
    take_sample,
    write_sample,
)
from extend.errors import CheckpointError, CompatibilityError
from extend.model_config import read_config
from tests.adapter_format.tiny_models import make_models

PINNED = [8400669, 9880112, 11210047, 7621857]


def opened(directory) -> tuple[Checkpoint, dict]:
    files = Checkpoint(directory)
    return files, parameter_infos(read_config(directory), files)


@pytest.fixture
def sampled(llama, tmp_path):
    """A directory with the sample of the Llama base."""
    write_sample(*opened(llama.base), tmp_path)
    return tmp_path


def test_values_are_the_bases_at_the_positions(qwen2, tmp_path):
    files, infos = opened(qwen2.base)
    path = write_sample(files, infos, tmp_path)
    sample, base = read_sample(tmp_path), load_file(qwen2.base / "model.safetensors")
    assert path == tmp_path / SAMPLE_NAME
    assert sample.infos == infos
    for name, x in base.items():
        at = positions(name, tuple(x.shape), 256)
        assert len(at) == min(256, x.numel())
        torch.testing.assert_close(sample.values[name], x.reshape(-1)[at], rtol=0, atol=0)


def test_positions_are_fixed_for_ever():
    """Adapters that exist rely on them."""
    assert positions("model.layers.0.mlp.up_proj.weight", (8192, 3072), 4).tolist() == PINNED
    assert positions("model.norm.weight", (5,), 256).tolist() == [0, 1, 2, 3, 4]


def test_positions_are_even_and_those_of_the_name():
    drawn = positions("a", (1000, 1000), 4000)
    # 16 bins of 250: the chi-squared of 15 degrees of freedom is below 37.7 in 99.9 % of draws.
    counts = torch.histc(drawn.double(), 16, 0, 1_000_000)
    assert float(((counts - 250) ** 2 / 250).sum()) < 37.7
    assert not torch.equal(drawn, positions("b", (1000, 1000), 4000))
    assert not torch.equal(drawn, positions("a", (1000, 1001), 4000))


def test_writing_twice_gives_the_same_bytes(llama, tmp_path):
    contents = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        contents.append(write_sample(*opened(llama.base), tmp_path / str(number)).read_bytes())
    assert contents[0] == contents[1]


def test_models_of_many_parameters_keep_fewer_values_of_each(llama, monkeypatch):
    monkeypatch.setattr("extend.delta.sample._TOTAL", 1000)
    sample = take_sample(*opened(llama.base))
    count = 1000 // len(sample.values)
    assert {len(values) for values in sample.values.values()} == {count}


def test_estimates_agree_with_the_whole(llama, sampled):
    target = opened(llama.target)
    whole = compare(*opened(llama.base), *target)
    found = compare_with_sample(read_sample(sampled), *target)
    assert found.sampled and found.kind == whole.kind
    assert found.matrices == whole.matrices
    for pick in ("cosine", "drift"):
        estimate, truth = getattr(found.overall, pick)(), getattr(whole.overall, pick)().value
        # Twice the 95 % interval: a draw beyond it comes once in 10,000.
        assert abs(estimate.value - truth) < estimate.high - estimate.low < 0.1
    # Parameters of 64 elements are kept whole, so there the two are the same sums.
    torch.testing.assert_close(found.tensors["model.norm.weight"].sums,
                               whole.tensors["model.norm.weight"].sums, rtol=1e-12, atol=0)


def test_the_base_itself_is_the_same(llama, sampled):
    found = compare_with_sample(read_sample(sampled), *opened(llama.base))
    assert found.kind == "same"
    drift = found.overall.drift()
    assert (drift.value, drift.low, drift.high) == (0, 0, None)
    equal = found.everything.equal_fraction()
    assert equal.value == equal.high == 1
    assert 0.99 < equal.low < 1  # a sample cannot know that all are


@pytest.mark.parametrize("rows", [(96, 101), (101, 96), (101, 1)])
def test_other_vocabulary(tmp_path, rows):
    models = [make_models(tmp_path / str(i), "qwen2", torch.float32, vocab_size=n, tied=True).base
              for i, n in enumerate(rows)]
    base, target = (load_file(model / "model.safetensors") for model in models)
    name = "model.embed_tokens.weight"
    common = min(rows)
    target = {**base, name: torch.cat([base[name][:common], torch.ones(max(0, rows[1] - common), 64)
                                       ])}
    save_file(target, models[1] / "model.safetensors", metadata={"format": "pt"})
    found = compare_with_sample(take_sample(*opened(models[0])), *opened(models[1]))
    assert found.resized == {name: rows}
    assert found.tensors[name].equal == found.tensors[name].elements <= common * 64
    assert found.kind == "light"


def test_values_that_are_not_finite(llama, sampled, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(llama.target, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of .*target holds infinite"):
        compare_with_sample(read_sample(sampled), *opened(target))


def test_other_sizes(sampled, tmp_path):
    other = make_models(tmp_path / "o", "llama", torch.float32, intermediate_size=80).base
    with pytest.raises(CompatibilityError, match=r"down_proj\.weight: shape \[64, 96\] in "
                                                 rf".*{SAMPLE_NAME} but \[64, 80\]"):
        compare_with_sample(read_sample(sampled), *opened(other))


def test_no_sample(tmp_path):
    assert read_sample(tmp_path) is None


def rewrite(directory, *, drop: str | None = None, **metadata) -> None:
    path = directory / SAMPLE_NAME
    with safe_open(path, framework="pt") as file:
        kept = {**file.metadata(), **metadata}
        values = {name: file.get_tensor(name) for name in read_header(path) if name != drop}
    save_file(values, path, metadata=kept)


def test_sample_of_a_later_schema(sampled):
    rewrite(sampled, schema="2")
    with pytest.raises(CheckpointError, match="of schema 2, not 1"):
        read_sample(sampled)


@pytest.mark.parametrize("change", [{"shapes": "{}"}, {"shapes": "no"}, {"shapes": "[1]"},
                                    {"drop": "model.norm.weight"}])
def test_damaged_sample(sampled, change):
    rewrite(sampled, **change)
    with pytest.raises(CheckpointError, match="values do not fit the shapes"):
        read_sample(sampled)


def test_truncated_sample(sampled):
    path = sampled / SAMPLE_NAME
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated"):
        read_sample(sampled)
