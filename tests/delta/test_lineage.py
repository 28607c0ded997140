"""Cosine, drift and equal elements against numpy, verdicts of models whose history is known."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from extend.adapter_format.sidecar import parameter_infos
from extend.checkpoint import Checkpoint, write_checkpoint
from extend.delta.lineage import CHANCE, HEAVY, UNRELATED, Lineage, compare, is_unrelated
from extend.delta.moments import Moments, sampled_moments, whole_moments
from extend.delta.sample import positions
from extend.errors import CheckpointError, CompatibilityError
from extend.model_config import read_config
from tests.adapter_format.tiny_models import build, edit_json, make_models, save


def opened(directory) -> tuple[Checkpoint, dict]:
    files = Checkpoint(directory)
    return files, parameter_infos(read_config(directory), files)


def measure(base, target) -> Lineage:
    return compare(*opened(base), *opened(target))


def derive(base, out, change):
    """A copy of a checkpoint with `change(name, tensor)` in place of every tensor."""
    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    changed = {n: change(n, x, generator).to(x.dtype) for n, x in sorted(tensors.items())}
    save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
    return out


def drifted(by: float):
    """Each matrix moved by `by` of its norm, in a random direction."""
    def change(name, x, generator):
        noise = torch.randn(x.shape, generator=generator)
        return x.float() + by * x.float().norm() / noise.norm() * noise if x.dim() > 1 else x
    return change


def with_shuffled_neurons(tensors: dict) -> dict:
    """The same function: the hidden neurons of every MLP in another order."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    index = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
    return {name: x.index_select(index[name.split(".")[-2]], order) if ".mlp." in name else x
            for name, x in tensors.items()}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """The Llama of the fixtures, from another seed."""
    model = build("llama")
    torch.manual_seed(77)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.04)
    return save(model, tmp_path_factory.mktemp("stranger") / "model", torch.float32)


def test_numbers_equal_numpys(qwen2):
    base = load_file(qwen2.base / "model.safetensors")
    target = load_file(qwen2.target / "model.safetensors")
    found = measure(qwen2.base, qwen2.target)
    assert set(found.tensors) == set(base)
    names = [n for n in base if ".layers." in n and base[n].dim() == 2]
    assert found.matrices == set(names)

    def flat(tensors, names):
        return np.concatenate([tensors[n].double().numpy().ravel() for n in names])
    single = [(moments, [name]) for name, moments in found.tensors.items()]
    for moments, group in [(found.overall, names), *single]:
        b, t = flat(base, group), flat(target, group)
        expected = [b @ t / (np.linalg.norm(b) * np.linalg.norm(t)),
                    np.linalg.norm(t - b) / np.linalg.norm(b), np.mean(b == t)]
        estimates = [moments.cosine(), moments.drift(), moments.equal_fraction()]
        for estimate in estimates:
            assert estimate.low == estimate.value == estimate.high
        # fp64 on both sides; only the order of the sums differs.
        np.testing.assert_allclose([e.value for e in estimates], expected, rtol=1e-11, atol=1e-12)


def test_blocks_do_not_change_the_sums(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base, target = (torch.randn(50, 7, generator=generator) for _ in range(2))
    whole = whole_moments(base, target)
    monkeypatch.setattr("extend.delta.moments._BLOCK", 33)
    blocks = whole_moments(base, target)
    torch.testing.assert_close(blocks.sums, whole.sums, rtol=1e-13, atol=1e-13)
    assert blocks.equal == whole.equal == 0


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32),
                                    (torch.bfloat16, torch.float32),
                                    (torch.float16, torch.float16)])
def test_equal_elements_are_counted_bit_for_bit(dtypes):
    base = torch.tensor([1.0, 0.0, 2.0, 3.5]).to(dtypes[0])
    target = torch.tensor([1.0, -0.0, 2.5, 3.5]).to(dtypes[1])
    # Across dtypes there are no bits to compare, and -0.0 equals 0.0.
    assert whole_moments(base, target).equal == (2 if dtypes[0] == dtypes[1] else 3)


def test_same_weights(llama):
    found = measure(llama.base, llama.base)
    assert found.kind == "same"
    assert found.verdict() == ("the same weights as the base (cosine 1, drift 0, 100 % of the "
                               "elements equal)")


@pytest.mark.parametrize("by, kind", [(0.01, "light"), (0.9 * HEAVY, "light"),
                                      (1.1 * HEAVY, "heavy"), (0.9, "heavy"), (1.2, "other-run")])
def test_drift_decides_between_light_and_heavy(llama, tmp_path, by, kind):
    found = measure(llama.base, derive(llama.base, tmp_path / "t", drifted(by)))
    assert found.kind == kind
    assert found.overall.drift().value == pytest.approx(by, rel=1e-4)
    # A random direction is at a right angle to within a few 1 / sqrt(n), n = 73,728 elements.
    assert found.overall.cosine().value == pytest.approx(1 / math.sqrt(1 + by * by), abs=0.01)


def test_norms_alone_changed_are_a_light_change(llama, tmp_path):
    target = derive(llama.base, tmp_path / "t",
                    lambda name, x, g: x + 0.5 if x.dim() == 1 else x)
    found = measure(llama.base, target)
    assert found.kind == "light"
    assert found.overall.drift().value == 0


def test_another_initialisation_is_unrelated(llama, stranger):
    found = measure(llama.base, stranger)
    assert found.kind == "unrelated"
    assert "trained from another initialisation" in found.verdict()
    # Why norms have no say: theirs are alike in models that share nothing.
    gains = found.part(name for name in found.tensors if "layernorm" in name)
    assert gains.cosine().value > 0.9


def test_shuffled_neurons_are_unrelated_in_part(stranger, tmp_path):
    target = tmp_path / "t"
    shutil.copytree(stranger, target)
    tensors = with_shuffled_neurons(load_file(stranger / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    found = measure(stranger, target)
    assert found.kind == "part"
    assert found.unrelated_parts() == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert "unrelated are mlp.down_proj, mlp.gate_proj, mlp.up_proj" in found.verdict()


def test_a_layer_from_elsewhere(llama, stranger, tmp_path):
    other = load_file(stranger / "model.safetensors")
    target = derive(llama.base, tmp_path / "t",
                    lambda name, x, g: other[name] if ".layers.1." in name else x)
    found = measure(llama.base, target)
    assert found.kind == "part"
    assert found.unrelated_parts() == ["layer 1"]


def test_larger_vocabulary_is_compared_where_both_have_rows(llama, tmp_path):
    larger = make_models(tmp_path, "llama", torch.float32, vocab_size=101).base
    tensors = load_file(larger / "model.safetensors")
    base = load_file(llama.base / "model.safetensors")
    for name, x in base.items():
        rows = torch.ones(5, 64)
        tensors[name] = torch.cat([x, rows]) if x.shape[0] == 96 and "mlp" not in name else x
    save_file(tensors, larger / "model.safetensors", metadata={"format": "pt"})
    found = measure(llama.base, larger)
    assert found.resized == {"lm_head.weight": (96, 101), "model.embed_tokens.weight": (96, 101)}
    assert found.everything.equal == found.everything.elements == sum(
        x.numel() for x in base.values())
    assert found.kind == "light"
    assert "lm_head.weight has 101 rows, the base's 96" in found.verdict()
    assert measure(larger, llama.base).resized["lm_head.weight"] == (101, 96)


def test_shuffled_rows_with_a_common_direction_are_another_vocabulary(llama, tmp_path):
    """Such as real embeddings, whose cosine with themselves shuffled is far from zero."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    base = derive(llama.base, tmp_path / "b",
                  lambda name, x, g: x + 0.8 * x.std() if "embed" in name else x)
    target = derive(base, tmp_path / "t",
                    lambda name, x, g: x[order] if "embed" in name else x)
    found = measure(base, target)
    assert found.tensors["model.embed_tokens.weight"].cosine().value > 0.3
    assert "the rows of model.embed_tokens.weight are not the base's" in found.verdict()


def test_another_tokenizer_is_seen_in_the_vocabulary(llama, stranger, tmp_path):
    other = load_file(stranger / "model.safetensors")
    target = derive(llama.base, tmp_path / "t",
                    lambda name, x, g: other[name] if "embed" in name or "head" in name else x)
    found = measure(llama.base, target)
    assert found.kind == "light"
    assert "the rows of model.embed_tokens.weight are not the base's (cosine" in found.verdict()
    assert "another tokenizer" in found.verdict()


def test_what_only_one_model_has_is_listed(llama, tmp_path):
    tied = tmp_path / "tied"
    shutil.copytree(llama.base, tied)
    tensors = load_file(tied / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    edit_json(tied / "config.json", tie_word_embeddings=True)
    found = measure(llama.base, tied)
    assert (found.only_base, found.only_target) == (("lm_head.weight",), ())
    assert measure(tied, llama.base).only_target == ("lm_head.weight",)
    assert found.everything.equal == found.everything.elements
    assert found.kind == "light"  # not the same model


def test_biases_of_qwen_are_compared_but_do_not_count_as_matrices(qwen2):
    found = measure(qwen2.base, qwen2.target)
    assert "model.layers.0.self_attn.q_proj.bias" in found.tensors
    assert not [name for name in found.matrices if "bias" in name or "norm" in name]


def test_shards_change_nothing(llama, tmp_path):
    sharded = tmp_path / "sharded"
    shutil.copytree(llama.target, sharded)
    (sharded / "model.safetensors").unlink()
    whole = Checkpoint(llama.target)
    write_checkpoint(sharded, list(whole.infos.values()), whole.read, max_shard_bytes=60_000)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert measure(llama.base, sharded).summary() == measure(llama.base, llama.target).summary()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(llama, tmp_path, value):
    def spoil(name, x, generator):
        return torch.full_like(x, value) if name == "model.norm.weight" else x
    target = derive(llama.base, tmp_path / "t", spoil)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of .* infinite or NaN"):
        measure(llama.base, target)


def test_other_sizes_cannot_be_compared(llama, tmp_path):
    other = make_models(tmp_path, "llama", torch.float32, intermediate_size=80).base
    with pytest.raises(CompatibilityError, match=r"mlp\.down_proj\.weight: shape \[64, 96\] in "
                                                 r".* but \[64, 80\] in"):
        measure(llama.base, other)


def test_other_names_cannot_be_compared(llama, tmp_path):
    target = tmp_path / "t"
    shutil.copytree(llama.base, target)
    tensors = load_file(llama.base / "model.safetensors")
    save_file({f"x.{name}".replace("layers", "blocks"): x for name, x in tensors.items()},
              target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompatibilityError, match="no matrix of a decoder layer in common"):
        measure(llama.base, target)


def test_integers_cannot_be_compared(llama, tmp_path):
    target = tmp_path / "t"
    shutil.copytree(llama.base, target)
    tensors = load_file(llama.base / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompatibilityError, match=r"model\.norm\.weight is I8"):
        measure(llama.base, target)


def test_cosine_of_zeros_is_not_defined():
    zeros, ones = torch.zeros(4), torch.ones(4)
    assert whole_moments(zeros, ones).cosine() is None
    assert whole_moments(zeros, ones).drift() is None
    assert whole_moments(zeros, zeros).equal_fraction().value == 1
    assert Moments.total([]).equal_fraction() is None
    assert not is_unrelated(whole_moments(zeros, ones))


def scales(shape, spread: float, generator) -> torch.Tensor:
    """Rows and columns of log-normal sizes."""
    rows, columns = (torch.exp(spread * torch.randn(n, generator=generator)) for n in shape)
    return rows[:, None] * columns


@pytest.mark.parametrize("spread, factor", [(0.0, 1.0), (0.3, math.exp(8 * 0.09))])
def test_chance_gives_the_variance_that_the_cut_is_made_for(spread, factor):
    """Independent matrices: variance 1/n, times E[s^4] / E[s^2]^2 = exp(8 spread^2)."""
    generator, shape, trials = torch.Generator().manual_seed(0), (128, 128), 400
    cosines = []
    for _ in range(trials):
        size = scales(shape, spread, generator)
        pair = [size * torch.randn(shape, generator=generator) for _ in range(2)]
        cosines.append(whole_moments(*pair).cosine().value)
    variance = np.mean(np.square(cosines)) * shape[0] * shape[1]
    # The variance of 400 draws is known to sqrt(2 / 400) = 7 %; scales of 128 rows add their own.
    assert variance == pytest.approx(factor, rel=0.25)
    assert max(map(abs, cosines)) < UNRELATED


def test_few_elements_are_given_the_benefit_of_chance():
    """With 100 elements a cosine of 0.3 is 3 standard deviations: chance may give it."""
    axis = torch.zeros(100)
    axis[0] = 1
    other = torch.zeros(100)
    other[0], other[1] = 0.3, math.sqrt(1 - 0.09)
    assert CHANCE / math.sqrt(100) > 0.3
    assert is_unrelated(whole_moments(axis, other))
    assert not is_unrelated(whole_moments(axis.repeat(100), other.repeat(100)))


@pytest.mark.parametrize("by", [0.003, 0.1, 0.7, None])
def test_intervals_of_samples_hold_the_whole_in_95_of_100(by):
    """Strata of unlike sizes and scales, bf16 as checkpoints are; `by` None: unrelated."""
    generator = torch.Generator().manual_seed(1)
    bases, targets = [], []
    for shape, std in (((400, 300), 0.02), ((64, 64), 0.3), ((900, 100), 0.05)):
        size = std * scales(shape, 0.3, generator)
        base = size * torch.randn(shape, generator=generator)
        step = size * torch.randn(shape, generator=generator)
        bases.append(base.bfloat16().reshape(-1))
        targets.append((step if by is None else base + by * step).bfloat16().reshape(-1))
    whole = Moments.total(map(whole_moments, bases, targets))
    truth = (whole.cosine().value, whole.drift().value, whole.equal_fraction().value)
    trials, hits = 400, np.zeros(3)
    for trial in range(trials):
        drawn = []
        for base, target in zip(bases, targets):
            at = positions(str(trial), tuple(base.shape), 256)
            drawn.append(sampled_moments(base[at], target[at], base.numel()))
        sample = Moments.total(drawn)
        estimates = (sample.cosine(), sample.drift(), sample.equal_fraction())
        hits += [e.low <= value <= e.high for e, value in zip(estimates, truth)]
    # 95 % of 400 varies by 1.1 points; the delta method at heavy tails costs a few more.
    assert (hits / trials > 0.90).all(), hits / trials
    assert hits[0] / trials < 0.995, "cosine intervals far too wide"
    assert hits[1] / trials < 0.995, "drift intervals far too wide"
