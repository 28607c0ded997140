"""The chunked loss against torch's own cross-entropy and transformers' loss."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from extend.train.data import IGNORE
from extend.train.loss import Teacher, chunked_loss

# Both sides are fp32 and sum over a few hundred terms in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def example(n: int = 37, d: int = 16, v: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, requires_grad=True)
    weight = torch.randn(v, d, generator=generator, requires_grad=True)
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[::5] = IGNORE
    return hidden, weight, labels, torch.rand(n, generator=generator)


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
def test_loss_and_gradients_equal_torch(chunk: int):
    hidden, weight, labels, weights = example()
    loss, nll = chunked_loss(hidden, weight, labels, weights, chunk=chunk)
    got = torch.autograd.grad(3.0 * loss, (hidden, weight))
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none", ignore_index=IGNORE)
    want = torch.autograd.grad(3.0 * (expected * weights).sum(), (hidden, weight))
    torch.testing.assert_close(nll, expected.detach(), **CLOSE)
    torch.testing.assert_close(loss, (expected * weights).sum(), **CLOSE)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # gradients sum up to 50 terms


@pytest.mark.parametrize(("chunk", "compiled"), [(1, False), (8, False), (37, False), (1000, False),
                                                 (1000, True)])
def test_divergence_and_gradients_equal_torch(chunk: int, compiled: bool):
    hidden, weight, labels, weights = example()
    other, theirs, _, _ = (2 * t.detach() if t.is_floating_point() else t
                           for t in example(d=24))
    loss, nll = chunked_loss(hidden, weight, labels, weights, chunk=chunk, compiled=compiled,
                             teacher=Teacher(other, theirs))
    got = torch.autograd.grad(3.0 * loss, (hidden, weight))
    divergence = F.kl_div((hidden @ weight.T).log_softmax(-1), (other @ theirs.T).log_softmax(-1),
                          reduction="none", log_target=True).sum(-1)
    expected = (divergence * weights)[labels != IGNORE].sum()
    want = torch.autograd.grad(3.0 * expected, (hidden, weight))
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nll, F.cross_entropy(
        hidden @ weight.T, labels, reduction="none", ignore_index=IGNORE).detach(), **CLOSE)


def test_a_teacher_of_the_same_mind_teaches_nothing():
    hidden, weight, labels, weights = example()
    loss, _ = chunked_loss(hidden, weight, labels, weights, chunk=8,
                           teacher=Teacher(hidden.detach(), weight.detach()))
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and all(not gradient.any() for gradient in gradients)


def test_large_logits_do_not_overflow():
    hidden, weight, labels, weights = example()
    loss, _ = chunked_loss(hidden * 1e3, weight, labels, weights, chunk=8)
    expected = F.cross_entropy(1e3 * hidden @ weight.T, labels, reduction="none",
                               ignore_index=IGNORE)
    torch.testing.assert_close(loss, (expected * weights).sum(), **CLOSE)


def test_all_labels_ignored_gives_zero():
    hidden, weight, labels, weights = example()
    loss, _ = chunked_loss(hidden, weight, torch.full_like(labels, IGNORE), weights, chunk=8)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(loss, torch.tensor(0.0))
    torch.testing.assert_close(gradients, (torch.zeros(37, 16), torch.zeros(50, 16)))


def test_frozen_head_gets_no_gradient():
    hidden, weight, labels, weights = example()
    frozen = weight.detach()
    loss, _ = chunked_loss(hidden, frozen, labels, weights, chunk=8)
    loss.backward()
    expected = F.cross_entropy(hidden @ frozen.T, labels, reduction="none", ignore_index=IGNORE)
    (want,) = torch.autograd.grad((expected * weights).sum(), hidden)
    torch.testing.assert_close(hidden.grad, want, rtol=1e-4, atol=1e-5)


def test_autocast_stays_near_fp32():
    hidden, weight, labels, weights = example()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = chunked_loss(hidden, weight, labels, weights, chunk=8)
    got = torch.autograd.grad(loss, (hidden, weight))
    exact, _ = chunked_loss(hidden, weight, labels, weights, chunk=8)
    want = torch.autograd.grad(exact, (hidden, weight))
    # bf16 keeps 8 bits: logits of size ~10 are off by up to 0.04, probabilities by a few percent.
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)


def test_equals_the_loss_of_transformers():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=70, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True))
    ids = torch.randint(0, 70, (1, 40))
    labels = ids.masked_fill(torch.rand(1, 40) < 0.3, IGNORE)
    want = model(input_ids=ids, labels=labels).loss
    shifted = F.pad(labels[0, 1:], (0, 1), value=IGNORE)
    count = (shifted != IGNORE).sum()
    hidden = model.model(input_ids=ids).last_hidden_state[0]
    got, _ = chunked_loss(hidden, model.lm_head.weight, shifted, torch.ones(40) / count, chunk=16)
    torch.testing.assert_close(got, want, **CLOSE)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_of_a_row_never_exist():
    n, d, v, chunk = 512, 4, 300, 16
    hidden, weight, labels, weights = example(n, d, v)
    with LargestTensor() as largest:
        loss, _ = chunked_loss(hidden, weight, labels, weights, chunk=chunk)
        loss.backward()
    assert largest.numel <= max(chunk * v, n * d, v * d)
