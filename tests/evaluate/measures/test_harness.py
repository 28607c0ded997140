import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from extend.errors import CompatibilityError, DataError, RecipeError
from extend.evaluate.frame import Frame
from extend.evaluate.measures.harness import describe_results, read_metrics
from extend.evaluate.score import proportion
from extend.evaluate.tasks import TASKS
from tests.evaluate.dense import dense_logits, measure, open_backend
from tests.tiny_text import make_tokenizer

TEXTS = ["a short one", "a question that is longer"]


class FakeLM:
    """What the harness makes of a model: it pads on the left and masks when it generates."""

    max_gen_toks = 4

    def __init__(self, pretrained, tokenizer, batch_size, max_length):
        self.model, self.tokenizer = pretrained, tokenizer
        self.batch_size, self.max_length = batch_size, max_length

    def tok_encode(self, text):
        return self.tokenizer(text)["input_ids"]

    def last_logits(self):
        rows = [self.tok_encode(text) for text in TEXTS]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            return self.model(ids, attention_mask=mask,
                              position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, -1]


@pytest.fixture
def package(monkeypatch):
    """Stands for lm_eval, with the parts of its API that are used; remembers its calls."""
    calls = SimpleNamespace(arguments=None, logits=None, paths=[])

    def simple_evaluate(**arguments):
        calls.arguments, calls.logits = arguments, arguments["model"].last_logits()
        sys.stdout.write("a table that must not be there")
        for name in arguments["tasks"]:
            if name not in ("one", "two"):
                raise KeyError(f"Spec {name!r} is not a registered task\nmore")
        return results_of(arguments["tasks"])

    def task_manager(include_path):
        calls.paths.append(include_path)
        return SimpleNamespace(all_tags=["tagged"])

    modules = {"lm_eval": {"simple_evaluate": simple_evaluate, "__version__": "0.0"},
               "lm_eval.models": {}, "lm_eval.models.huggingface": {"HFLM": FakeLM},
               "lm_eval.tasks": {"TaskManager": task_manager}}
    for name, members in modules.items():
        module = ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def results_of(names, request=("what", " this")):
    return {"results": {name: {"alias": name, "sample_len": 8, "acc,none": 0.625,
                               "acc_stderr,none": 0.182981, "acc_norm,none": 0.5,
                               "acc_norm_stderr,none": "N/A", "exact_match,strict": 0.25,
                               "exact_match_stderr,strict": 0.163663} for name in names},
            "n-samples": {name: {"original": 100, "effective": 8} for name in names},
            "n-shot": dict.fromkeys(names, 3), "group_subtasks": {},
            "samples": {name: [{"arguments": [request, request]}] * 8 for name in names}}


def lm_of(max_length=512):
    return FakeLM(None, make_tokenizer("bytes"), 1, max_length)


def test_rows_are_the_harness_numbers_with_their_own_errors(package, model_dir, capsys):
    backend = open_backend(model_dir)
    task = TASKS["lm-eval"](tasks="one, two", num_fewshot=3, limit=8, include_path="/tasks",
                            batch_size=2)
    _, rows = measure(backend, task, label="lm")
    assert [row["name"] for row in rows] == ["lm one", "lm two"]
    row = rows[0]
    assert row["metrics"] == {
        "acc": {"value": 0.625, "stderr": 0.182981}, "acc_norm": {"value": 0.5, "stderr": None},
        "exact_match,strict": {"value": 0.25, "stderr": 0.163663}}
    assert (row["metric"], row["stderr"], row["num_fewshot"]) == ("acc", 0.182981, 3)
    assert {key: row[key] for key in proportion(5, 8)} == proportion(5, 8)
    assert (row["correct"], row["length"], row["control"], row["lm_eval"]) == (5, None, None, "0.0")
    assert row["actual_length"] == len(TEXTS[1]) + 1
    given = package.arguments
    assert (given["tasks"], given["num_fewshot"], given["limit"]) == (["one", "two"], 3, 8)
    assert given["apply_chat_template"] is False and package.paths == ["/tasks"]
    assert (given["model"].batch_size, given["model"].max_length) == (2, 512)
    assert "a table" not in capsys.readouterr().out


def test_the_harness_may_pad_and_mask(package, model_dir):
    backend = open_backend(model_dir)
    measure(backend, TASKS["lm-eval"](tasks="one"))
    wanted = torch.stack([dense_logits(model_dir, backend.tokenizer(text)["input_ids"])[-1]
                          for text in TEXTS])
    torch.testing.assert_close(package.logits, wanted, rtol=1e-4, atol=1e-4)  # fp32 logits of 30
    assert backend.model.config._attn_implementation == "extend_prefill"
    assert not backend.model._forward_pre_hooks


def test_the_score_may_be_another_metric():
    row = describe_results(results_of(["one"]), "one", "exact_match,strict", lm_of())
    assert (row["score"], row["correct"], row["stderr"]) == (0.25, 2, 0.163663)
    with pytest.raises(DataError, match="no metric 'f1'; it has acc, acc_norm, exact_match"):
        describe_results(results_of(["one"]), "one", "f1", lm_of())


def test_a_group_is_the_harness_mean_of_its_tasks():
    results = results_of(["one", "two"])
    results["groups"] = {"both": {"acc,none": 0.75, "acc_stderr,none": 0.1}}
    results["group_subtasks"] = {"both": ["inner"], "inner": ["one", "two"]}
    row = describe_results(results, "both", None, lm_of())
    assert (row["score"], row["n"], row["stderr"]) == (0.75, 16, 0.1)
    assert list(row["subtasks"]) == ["one", "two"]
    assert row["subtasks"]["two"]["acc"]["value"] == 0.625
    del results["groups"]
    bare = describe_results(results, "both", None, lm_of())
    assert bare["score"] is None and bare["metrics"] == {} and list(bare["subtasks"])


def test_losses_are_no_scores():
    results = results_of(["one"])
    results["results"]["one"] = {"bits_per_byte,none": 0.9, "word_perplexity,none": 12.5}
    row = describe_results(results, "one", None, lm_of())
    assert row["score"] is row["metric"] is None
    assert row["metrics"]["word_perplexity"] == {"value": 12.5, "stderr": None}
    assert read_metrics({"alias": "x", "acc,none": "N/A", "sample_len": 3}) == {}


@pytest.mark.parametrize(("request_", "room", "fits"), [
    (("x" * 20, "y" * 5), 24, True), (("x" * 20, "y" * 5), 23, False),
    (("x" * 20, {"max_gen_toks": 9}), 29, True), (("x" * 20, {"max_gen_toks": 9}), 28, False),
    (("x" * 20, {}), 24, True), (("x" * 20, {}), 23, False), (("x" * 20,), 5, True)])
def test_requests_that_were_cut_are_refused(request_, room, fits):
    results = results_of(["one"], request_)
    if fits:
        assert describe_results(results, "one", None, lm_of(room))["score"] == 0.625
        return
    with pytest.raises(DataError, match=r"a request of \d+ tokens does not fit into the \d+"):
        describe_results(results, "one", None, lm_of(room))


def test_prompts_have_a_hash():
    one, same, other = (describe_results(results_of(["one"], request), "one", None, lm_of())
                        for request in (("a", "b"), ("a", "b"), ("a", "c")))
    assert one["prompt_sha256"] == same["prompt_sha256"] != other["prompt_sha256"]


def test_errors(package, model_dir, monkeypatch):
    backend = open_backend(model_dir)
    with pytest.raises(DataError, match=r"three: lm-eval cannot run it .*registered task\)"):
        measure(backend, TASKS["lm-eval"](tasks="three"))
    assert backend.model.config._attn_implementation == "extend_prefill"
    with pytest.raises(DataError, match="'tagged' is a tag of several tasks"):
        measure(backend, TASKS["lm-eval"](tasks="one,tagged"))
    for tasks in (" , ", "one,one"):
        with pytest.raises(RecipeError, match="must name tasks of the harness"):
            TASKS["lm-eval"](tasks=tasks)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    task = TASKS["lm-eval"](tasks="one")
    with pytest.raises(CompatibilityError,
                       match=r"^lm one: needs lm-evaluation-harness; pip install '.*\[lm-eval\]'$"):
        task.prompts(Frame.of(backend.tokenizer), task.cells("lm", (), (), 0)[0], 0)
