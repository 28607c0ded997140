import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from extend.errors import CompatibilityError
from extend.evaluate.attention import register_prefill_attention
from extend.evaluate.forward import score_answers
from extend.evaluate.load import load_model
from extend.evaluate.tasks.task import Prompt
from tests.evaluate.conftest import make_model

# Sums over a few hundred fp32 terms in another order, at losses of size 10 to 100.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture
def model(model_dir):
    return load_model(model_dir, device=torch.device("cpu"), dtype=torch.float32)


def random_prompts(lengths, answer_len=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Prompt(torch.randint(0, 400, (n,), generator=generator).tolist(), answer_len)
            for n in lengths]


def save_mistral(directory, window):
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=window,
        initializer_range=0.3)).save_pretrained(directory)
    return directory


def oracle(model_dir, prompt, model_class=LlamaForCausalLM):
    """First choices and loss from transformers' eager attention and all logits."""
    model = model_class.from_pretrained(model_dir, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor([prompt.ids])).logits[0, -prompt.answer_len - 1:-1]
    wanted = torch.tensor(prompt.ids[-prompt.answer_len:])
    return logits.argmax(-1).tolist(), float(functional.cross_entropy(logits, wanted,
                                                                      reduction="sum"))


@pytest.mark.parametrize("chunk", [7, 64, 100, 10_000])
def test_scores_are_those_of_a_plain_forward(model, model_dir, chunk):
    # Lengths in no order: padded batches, single rows, and rows read in parts.
    prompts = random_prompts([30, 200, 12, 131, 30])
    scores = score_answers(model, prompts, chunk=chunk)
    for prompt, score in zip(prompts, scores, strict=True):
        choices, loss = oracle(model_dir, prompt)
        assert score.predicted == choices
        torch.testing.assert_close(score.nll, loss, **TOLERANCE)
        assert not score.correct


def test_answer_may_span_parts(model, model_dir):
    prompt, = random_prompts([100], answer_len=90)
    score, = score_answers(model, [prompt], chunk=16)
    choices, loss = oracle(model_dir, prompt)
    assert score.predicted == choices
    torch.testing.assert_close(score.nll, loss, **TOLERANCE)


def test_correct_means_that_greedy_generation_writes_the_answer(model):
    generator = LlamaForCausalLM(model.config)
    generator.load_state_dict(model.state_dict())
    generator.eval().set_attn_implementation("eager")
    for prompt in random_prompts([20, 57, 110], answer_len=1):
        ids = torch.tensor([prompt.ids])
        written = generator.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6,
                                     do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
        score, = score_answers(model, [Prompt(written, 6)], chunk=40)
        assert score.correct and score.predicted == written[-6:]
        for place in range(1, 7):
            changed = list(written)
            changed[-place] = (changed[-place] + 1) % 400
            wrong, = score_answers(model, [Prompt(changed, 6)], chunk=40)
            assert not wrong.correct


class _Largest(TorchDispatchMode):
    """Remembers the most elements that one operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("chunk", [4096, 1024])
@pytest.mark.parametrize("window", [None, 512])
def test_neither_scores_nor_a_mask_nor_all_logits_exist(model_dir, tmp_path, chunk, window):
    length = 4096
    model = load_model(save_mistral(tmp_path, window) if window else model_dir,
                       device=torch.device("cpu"), dtype=torch.float32)
    prompt, = random_prompts([length])
    with _Largest() as seen:
        score_answers(model, [prompt], chunk=chunk)
    # The MLP is the widest thing that may exist: 48 channels a token.
    assert seen.elements <= 48 * length < length * min(400, chunk)


@pytest.mark.parametrize("chunk", [1000, 24])
def test_sliding_windows_are_kept(tmp_path, chunk):
    model = load_model(save_mistral(tmp_path, 16), device=torch.device("cpu"), dtype=torch.float32)
    prompts = random_prompts([100, 11, 60])
    for prompt, score in zip(prompts, score_answers(model, prompts, chunk=chunk), strict=True):
        choices, loss = oracle(tmp_path, prompt, MistralForCausalLM)
        assert score.predicted == choices
        torch.testing.assert_close(score.nll, loss, **TOLERANCE)


def test_models_that_change_their_logits_are_refused(model):
    model.config.logits_scaling = 8.0
    with pytest.raises(CompatibilityError, match="logits_scaling changes the logits"):
        score_answers(model, random_prompts([10]), chunk=100)


def test_rope_that_follows_the_length_is_not_read_in_parts():
    model = make_model(rope_parameters={"rope_type": "dynamic", "factor": 4.0,
                                        "rope_theta": 10000.0})
    model.set_attn_implementation(register_prefill_attention())
    with pytest.raises(CompatibilityError, match="'dynamic' changes with the length"):
        score_answers(model, random_prompts([100]), chunk=50)
    assert len(score_answers(model, random_prompts([100]), chunk=100)) == 1


@pytest.mark.parametrize("short", [1.0, 2.0])
def test_per_pair_rope_is_read_in_parts_when_it_is_the_same_at_every_length(short):
    model = make_model(rope_parameters={
        "rope_type": "longrope", "factor": 4.0, "attention_factor": 1.0, "rope_theta": 10000.0,
        "short_factor": [short] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64})
    model.set_attn_implementation(register_prefill_attention())
    prompts = random_prompts([100])
    if short != 2.0:
        with pytest.raises(CompatibilityError, match="'longrope' changes with the length"):
            score_answers(model, prompts, chunk=50)
        return
    parts, whole = (score_answers(model, prompts, chunk=chunk)[0] for chunk in (50, 100))
    assert parts.predicted == whole.predicted
    assert parts.nll == pytest.approx(whole.nll, rel=1e-5)  # fp32 sums in another order
