"""The conflict of two deltas against numpy's full SVD, and against what chance gives."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from extend.adapter import extract
from extend.adapter_format.peft_files import Adapter
from extend.adapter_format.sidecar import parameter_infos
from extend.checkpoint import Checkpoint
from extend.delta.conflict import Conflict, _of_matrix, measure_conflict
from extend.delta.lineage import compare
from extend.delta.sources import AdapterDelta, ModelDelta
from extend.errors import CompatibilityError
from extend.model_config import read_config
from tests.adapter_format.tiny_models import make_models


def measure(models, source, rank=3, target=None):
    sides = []
    for directory in (models.base, target or models.target):
        files = Checkpoint(directory)
        sides.append((files, parameter_infos(read_config(directory), files)))
    found = compare(*sides[0], *sides[1])
    return measure_conflict(found, source, sides[0][0], sides[1][0], rank=rank)


def expected(long: np.ndarray, sibling: np.ndarray, rank: int) -> Conflict:
    u, _, vt = np.linalg.svd(sibling, full_matrices=False)
    return Conflict((long ** 2).sum(), (sibling ** 2).sum(), (long * sibling).sum(),
                    ((u[:, :rank].T @ long) ** 2).sum(), ((long @ vt[:rank].T) ** 2).sum(),
                    (long ** 2).sum() * rank / long.shape[0],
                    (long ** 2).sum() * rank / long.shape[1])


def test_every_matrix_equals_numpys(llama):
    base, tuned, target = (load_file(d / "model.safetensors")
                           for d in (llama.base, llama.tuned, llama.target))
    found = measure(llama, ModelDelta.open(llama.base, llama.tuned))
    assert set(found) == {n for n in base if ".layers." in n and base[n].dim() == 2}
    for name, conflict in found.items():
        deltas = [(x[name] - base[name]).double().numpy() for x in (tuned, target)]
        # The subspaces come from fp32 data by a Gram matrix in fp64.
        np.testing.assert_allclose(conflict, expected(*deltas, 3), rtol=2e-4)


def test_an_adapter_of_full_rank_gives_the_same(llama, tmp_path):
    adapter = extract(llama.base, llama.tuned, tmp_path / "adapter", rank=64)
    found = measure(llama, AdapterDelta(Adapter(adapter)))
    whole = measure(llama, ModelDelta.open(llama.base, llama.tuned))
    for name, conflict in found.items():
        np.testing.assert_allclose(conflict, whole[name], rtol=1e-3, atol=1e-6)


def test_a_delta_beside_itself(llama):
    found = Conflict.total(measure(llama, ModelDelta.open(llama.base, llama.tuned),
                                   target=llama.tuned, rank=64).values())
    assert found.cosine == pytest.approx(1, abs=1e-9)
    shares = found.to_json()
    assert shares["left"] == pytest.approx(1, abs=1e-4)
    assert shares["right"] == pytest.approx(1, abs=1e-4)


def test_a_target_that_is_the_base(llama):
    found = measure(llama, ModelDelta.open(llama.base, llama.tuned), target=llama.base)
    total = Conflict.total(found.values())
    assert total.cosine is None
    assert total.to_json()["left"] == 0


def test_a_long_delta_of_zero(llama):
    total = Conflict.total(measure(llama, ModelDelta.open(llama.base, llama.base)).values())
    assert total.to_json() == dict.fromkeys(
        ("cosine", "left", "right", "left_chance", "right_chance"))


def test_unrelated_deltas_have_what_chance_gives():
    generator = torch.Generator().manual_seed(0)
    long = torch.randn(40, 4, generator=generator) @ torch.randn(4, 100, generator=generator)
    total = Conflict.total(_of_matrix(long, torch.randn(40, 100, generator=generator), 8, generator)
                           for _ in range(50))
    shares = total.to_json()
    # A share is a mean of 4 directions x 50 draws of a beta variable of mean k/m: within 10 %.
    assert shares["left_chance"] == pytest.approx(8 / 40)
    assert shares["right_chance"] == pytest.approx(8 / 100)
    assert shares["left"] == pytest.approx(8 / 40, rel=0.1)
    assert shares["right"] == pytest.approx(8 / 100, rel=0.2)


def test_a_subspace_is_no_larger_than_the_delta():
    """A sibling of rank 2 has 2 leading directions, whatever is asked for."""
    generator = torch.Generator().manual_seed(0)
    sibling = torch.randn(40, 2, generator=generator) @ torch.randn(2, 100, generator=generator)
    long = torch.randn(40, 100, generator=generator)
    found = _of_matrix(long, sibling, 8, generator)
    np.testing.assert_allclose(found, expected(long.double().numpy(), sibling.double().numpy(), 2),
                               rtol=1e-4)


def test_an_adapter_for_other_modules(llama, tmp_path):
    other = make_models(tmp_path, "llama", torch.float32, num_hidden_layers=3)
    adapter = extract(other.base, other.tuned, tmp_path / "adapter", rank=2)
    with pytest.raises(CompatibilityError, match=r"changes model\.layers\.2\..* do not both have"):
        measure(llama, AdapterDelta(Adapter(adapter)))


def test_an_adapter_of_other_shapes(llama, tmp_path):
    other = make_models(tmp_path, "llama", torch.float32, intermediate_size=80)
    adapter = extract(other.base, other.tuned, tmp_path / "adapter", rank=2)
    with pytest.raises(CompatibilityError, match=r"mlp\.down_proj\.weight: shape \[64, 80\] in"):
        measure(llama, AdapterDelta(Adapter(adapter)))
