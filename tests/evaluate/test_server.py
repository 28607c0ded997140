import json
import logging
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from extend.errors import CompatibilityError, RecipeError, ServerError
from extend.evaluate import evaluate
from extend.evaluate.backends.local import LocalBackend
from extend.evaluate.backends.server import ServerBackend, ServerOptions
from extend.evaluate.cells import Job, score_with
from extend.evaluate.frame import Frame
from extend.evaluate.load import load_model
from extend.evaluate.measures import MEASURES
from extend.evaluate.plan import order_units, plan_tasks
from extend.evaluate.rows import RowStore
from extend.evaluate.runner import make_runner
from extend.evaluate.tasks import TASKS, Cell
from extend.evaluate.tasks.task import Prompt
from extend.tokenizer import load_tokenizer
from tests.evaluate.loopback_server import Loopback, PlainModel, Scripted
from tests.tiny_text import make_tokenizer

KEY = "sk-secret-0123456789"
FAST = {"backoff_seconds": 0.001, "timeout_seconds": 5.0}


@pytest.fixture(scope="module")
def oracle(model_dir):
    return PlainModel(model_dir)


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return load_tokenizer(model_dir)


@pytest.fixture(scope="module")
def local(model_dir, tokenizer):
    return LocalBackend(load_model(model_dir, device=torch.device("cpu"), dtype=torch.float32),
                        tokenizer, chunk=400)


@pytest.fixture
def server(tokenizer):
    with Loopback(Scripted([20, 21, 22, 23, 24, 25, 26, 27, 28, 1]), tokenizer) as loopback:
        yield loopback


@pytest.fixture
def real(server, oracle):
    server.model = oracle
    return server


def connect(server, tokenizer, **options):
    backend = ServerBackend.open(server.url, tokenizer, ServerOptions(**{**FAST, **options}))
    server.bodies.clear()
    server.asked.clear()
    return backend


def passkeys(tokenizer, length=400, trials=2):
    return TASKS["passkey"]().prompts(Frame.of(tokenizer), Cell(
        "x", "passkey", length, 0.5, trials), seed=3)


@pytest.fixture(scope="module")
def answered(oracle, tokenizer):
    """Three passkey prompts, of which the second has the answer that the model gives, and the
    third all of it but its last token."""
    prompts = passkeys(tokenizer, trials=3)
    for i in (1, 2):
        begun = prompts[i].ids[:-prompts[i].answer_len]
        right = oracle.write(begun, prompts[i].answer_len)
        prompts[i] = replace(prompts[i], ids=begun + right, answer_len=len(right))
    last = tokenizer.decode(prompts[2].ids[-1:])
    prompts[2].ids[-1] = next(i for i in range(250) if tokenizer.decode([i]).strip() not in (
        "", last.strip()))
    return prompts


@pytest.mark.parametrize(("owned_by", "options"), [
    ("vllm", {}), ("sglang", {}), ("llamacpp", {}), ("someone", {}),
    ("someone", {"prompt": "text"}), ("vllm", {"scoring": "echo"})])
def test_passkey_is_scored_as_in_process(real, tokenizer, answered, local, owned_by, options):
    real.owned_by = owned_by
    backend = connect(real, tokenizer, **options)
    mine, theirs = local.score(answered), backend.score(answered)
    assert [s.correct for s in mine] == [s.correct for s in theirs] == [False, True, False]
    for one, other in zip(mine, theirs, strict=True):
        if owned_by == "someone":
            continue  # this vocabulary has ids without text, so text does not give them back
        # What follows a wrong token is another question: the server goes on from its own.
        same = len(one.predicted) if one.correct else 1
        assert other.predicted[:same] == one.predicted[:same]
        if options.get("scoring") == "echo":
            assert other.predicted == one.predicted
            assert other.nll == pytest.approx(one.nll, rel=1e-5)  # fp32 sums in another order
        else:
            assert other.nll is None
    sent = real.bodies[0]
    assert sent["temperature"] == 0 and sent["frequency_penalty"] == 0
    if "prompt" not in options:
        assert all(isinstance(body["prompt"], list) for body in real.bodies)


def test_rows_are_those_of_the_measure(real, tokenizer, local):
    backend = connect(real, tokenizer, prompt="text")
    task, cell = TASKS["passkey"](), Cell("x", "passkey", 400, 0.5, 2)
    rows = [MEASURES["exact"](b, Frame.of(tokenizer), task, [cell], 3)[0] for b in (local, backend)]
    assert rows[1]["answer_loss"] is None
    same = [{k: v for k, v in row.items() if k not in ("answer_loss", "trials")} for row in rows]
    assert same[0] == same[1]
    for mine, theirs in zip(rows[0]["trials"], rows[1]["trials"], strict=True):
        assert theirs["needle_position"] == mine["needle_position"]
        assert theirs["server_tokens"] == theirs["prompt_tokens"] < 400


@pytest.mark.parametrize(("owned_by", "prompt"), [("vllm", "ids"), ("llamacpp", "ids"),
                                                  ("someone", "ids"), ("someone", "text")])
def test_generation_is_that_of_the_model_in_process(real, tokenizer, local, owned_by, prompt):
    real.owned_by = owned_by
    prompts = [Prompt(p.ids[:n], 0, max_new_tokens=budget) for p, n, budget in zip(
        passkeys(tokenizer), (400, 37), (8, 24), strict=True)]
    found = connect(real, tokenizer, prompt=prompt).generate(prompts)
    for one, other, p in zip(local.generate(prompts), found, prompts, strict=True):
        assert (other.text, other.finished) == (one.text, one.finished)
        if owned_by != "someone":
            assert other.ids == one.ids
        assert other.details == ({} if prompt == "ids" else {
            "prompt_tokens": len(p.ids), "server_tokens": len(p.ids)})


def test_an_evaluation_goes_on_where_its_server_failed(server, tokenizer, model_dir, tmp_path,
                                                       monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    backend = connect(server, tokenizer, retries=0)
    planned = plan_tasks(["passkey"], lengths=[400], depths=2, trials=1)
    store = RowStore.open(tmp_path / "rows", {"server": backend.identity})
    job = Job(model=str(model_dir), adapter=None, device="cpu", dtype="float32", chunk=1, seed=0,
              rows=store.directory)
    server.faults = ["", "broken"]
    with pytest.raises(ServerError, match="Finished cells are kept"):
        score_with(backend, job, order_units(planned))
    done = RowStore.open(tmp_path / "rows", {"server": backend.identity}).read()
    assert len(done) == 1 and len(server.bodies) == 2
    score_with(backend, job, order_units(planned, done))
    assert len(store.read()) == 4 and len(server.bodies) == 5
    assert KEY not in "".join(p.read_text() for p in store.directory.iterdir())


def test_an_answer_that_ends_itself_is_finished(server, tokenizer):
    server.model = Scripted([70, 71, 1])
    backend = connect(server, tokenizer)
    ended, cut = backend.generate([Prompt([5, 6], 0, max_new_tokens=n) for n in (3, 2)])
    assert (ended.ids, ended.finished) == ([70, 71], True)
    assert (cut.ids, cut.finished) == ([70, 71], False)
    assert ended.text == cut.text == tokenizer.decode([70, 71])
    score, = backend.score([Prompt([5, 6, 70, 71, 72], 3)])
    assert not score.correct


def test_losses_come_from_an_echo(real, tokenizer, local):
    backend = connect(real, tokenizer, scoring="echo")
    rows = [p.ids[:n] for p, n in zip(passkeys(tokenizer), (90, 400), strict=True)]
    for mine, theirs in zip(local.token_losses(rows), backend.token_losses(rows), strict=True):
        assert theirs.dtype == np.float32
        np.testing.assert_allclose(theirs, mine, rtol=1e-4, atol=1e-4)  # fp32 against fp64 softmax
    with pytest.raises(CompatibilityError, match="losses through a server need scoring 'echo'"):
        connect(real, tokenizer).token_losses(rows)


def test_what_cannot_be_answered_is_refused_by_name(real, tokenizer):
    real.max_len = 2048
    backend = connect(real, tokenizer)
    backend.check([("needle", "generated", 2048), ("json", "exact", None)])
    with pytest.raises(CompatibilityError, match="wiki: 'loss' is not measured through a server "
                       "with scoring 'generate'; scoring 'echo' gives losses"):
        backend.check([("wiki", "loss", None)])
    with pytest.raises(CompatibilityError, match="grid: 'stream' is not measured .* in process"):
        backend.check([("grid", "stream", 1024)])
    with pytest.raises(CompatibilityError, match="far: 2049 tokens .* with a context of 2048"):
        backend.check([("far", "exact", 2049)])
    echoing = connect(real, tokenizer, scoring="echo")
    echoing.check([("wiki", "loss", 2047), ("needle", "generated", 2048)])
    with pytest.raises(CompatibilityError, match="wiki: 2049 tokens"):
        echoing.check([("wiki", "loss", 2048)])


def test_a_server_has_no_second_model(server, tokenizer):
    with pytest.raises(CompatibilityError, match="base: a server is asked for one model"):
        connect(server, tokenizer).reference("base")


def test_a_prompt_beyond_the_context_is_never_sent(server, tokenizer):
    server.max_len = 300
    backend = connect(server, tokenizer)
    with pytest.raises(CompatibilityError, match="400 tokens with the answer, but tiny is served "
                       "with a context of 300"):
        backend.score(passkeys(tokenizer))
    assert server.bodies == []


@pytest.mark.parametrize("fault", ["busy", "broken", "drop", "short", "garbage"])
def test_passing_failures_are_tried_again(server, tokenizer, fault):
    backend = connect(server, tokenizer, concurrency=1)
    server.faults = [fault, fault]
    found = backend.generate([Prompt([5, 6], 0, max_new_tokens=n) for n in (2, 3)])
    assert [g.ids for g in found] == [[20, 21], [20, 21, 22]]
    assert len(server.bodies) == 4


@pytest.mark.parametrize(("fault", "told"), [
    ("busy", "status 429"), ("broken", "status 500: {\"error\": \"engine died\"}"),
    ("drop", "RemoteDisconnected"), ("short", "IncompleteRead"), ("garbage", "no JSON")])
def test_lasting_failures_end_after_the_last_try(server, tokenizer, fault, told):
    backend = connect(server, tokenizer, retries=2, concurrency=1)
    server.always = fault
    with pytest.raises(ServerError, match=f"failed 3 times, at last with .*{told}"):
        backend.score(passkeys(tokenizer, trials=1))
    assert len(server.bodies) == 3


def test_a_hanging_server_is_not_asked_twice(server, tokenizer):
    backend = connect(server, tokenizer, timeout_seconds=0.2)
    server.always = "hang"
    with pytest.raises(ServerError, match=r"no answer within 0\.2 s"):
        backend.score(passkeys(tokenizer, trials=1))
    assert len(server.bodies) == 1


@pytest.mark.parametrize(("fault", "error", "told"), [
    ("empty", ServerError, "not exactly one choice"),
    ("uncounted", ServerError, "without usage.prompt_tokens"),
    ("aborted", ServerError, "ended with 'abort'"),
    ("textless", ServerError, "no text"),
    ("cut", ServerError, "cut after 7 of 8 tokens"),
    ("context", CompatibilityError, "context is shorter than a prompt of 400 tokens with 8 .*"
                                    "maximum context length is 64"),
    ("moved", ServerError, "status 302")])
def test_wrong_answers_are_errors_at_once(server, tokenizer, fault, error, told):
    backend = connect(server, tokenizer)
    prompt = replace(passkeys(tokenizer, trials=1)[0], answer_len=0, max_new_tokens=8)
    server.always = fault
    with pytest.raises(error, match=told):
        backend.generate([prompt])
    assert len(server.bodies) == 1


def test_an_empty_answer_is_a_wrong_one(server, tokenizer):
    backend = connect(server, tokenizer)
    server.always = "blank"
    score, = backend.score(passkeys(tokenizer, trials=1))
    assert (score.correct, score.predicted) == (False, [])


def test_after_a_failure_no_more_is_asked(server, tokenizer):
    backend = connect(server, tokenizer, concurrency=1)
    server.faults = ["", "aborted"]
    with pytest.raises(ServerError, match="abort"):
        backend.score(passkeys(tokenizer, trials=12))
    assert len(server.bodies) < 6


def test_so_many_are_asked_at_once(server, tokenizer):
    backend = connect(server, tokenizer, concurrency=3)
    server.delay_seconds = 0.03
    prompts = [Prompt([5, 6], 0, max_new_tokens=n) for n in range(1, 9)]
    assert [len(g.ids) for g in backend.generate(prompts)] == list(range(1, 9))
    assert server.peak == 3 and len(server.bodies) == 8


def test_a_wrong_count_is_an_error(server, tokenizer):
    backend = connect(server, tokenizer)
    server.miscount = -3
    with pytest.raises(ServerError, match="read 39[0-9] tokens of a prompt of 39[0-9]; it has cut"):
        backend.score(passkeys(tokenizer, trials=1))
    with pytest.raises(CompatibilityError, match="tokens where .* ids were sent"):
        connect(server, tokenizer)


def test_text_may_lack_its_special_tokens_but_no_others(server, tokenizer):
    server.owned_by, server.adds_bos = "someone", False
    server.takes_ids = False
    backend = connect(server, tokenizer, prompt="text")
    prompt, = passkeys(tokenizer, trials=1)
    sent = 400 - prompt.answer_len
    score, = backend.score([prompt])
    assert score.details == {"prompt_tokens": sent, "server_tokens": sent - 1}
    assert not server.bodies[0]["prompt"].startswith("<bos>")
    server.miscount = -1
    with pytest.raises(ServerError, match=f"read {sent - 2} tokens of a prompt of {sent}; its "
                       "tokenizer cuts the text otherwise; raise slack"):
        backend.score([prompt])
    backend.options = replace(backend.options, slack=1)
    score, = backend.score([prompt])
    assert score.details["server_tokens"] == sent - 2


def test_a_server_that_takes_no_ids_is_refused_with_advice(server, tokenizer):
    server.takes_ids = False
    with pytest.raises(CompatibilityError, match="refuses token ids .*server prompt 'text'"):
        connect(server, tokenizer)


@pytest.mark.parametrize("tokenizes", [True, False])
def test_another_tokenizer_is_refused(server, tokenizer, tokenizes):
    server.tokenizer, server.tokenizes = make_tokenizer("merged-digits"), tokenizes
    with pytest.raises(CompatibilityError, match="its tokenizer is not that of the model direct"):
        connect(server, tokenizer)


def test_the_model_is_named_where_there_are_several(server, tokenizer):
    server.names = ("tiny", "other")
    with pytest.raises(RecipeError, match=r"serves 2 models \(tiny, other\); name one"):
        connect(server, tokenizer)
    with pytest.raises(CompatibilityError, match="no model 'base' but tiny, other"):
        connect(server, tokenizer, model="base")
    backend = connect(server, tokenizer, model="other")
    backend.score(passkeys(tokenizer, trials=1))
    assert server.bodies[0]["model"] == "other"
    models = server.models()
    models["data"][1] |= {"parent": "tiny", "max_model_len": None, "root": "/adapters/a"}
    models["data"][0]["aliases"] = ["small"]
    server.models = lambda: models
    adapter = connect(server, tokenizer, model="other").served
    assert (adapter.max_len, adapter.source) == (4096, "/adapters/a")
    assert connect(server, tokenizer, model="small").served.model == "small"
    del server.models
    server.names = ()
    assert connect(server, tokenizer, model="x").identity["model"] == "x"


def test_a_server_without_an_echo_is_refused(server, tokenizer):
    server.owned_by = "llamacpp"
    with pytest.raises(CompatibilityError, match="llamacpp gives no log-probabilities of a prompt"):
        connect(server, tokenizer, scoring="echo")
    server.owned_by = "someone"
    server.complete = lambda body: Loopback.complete(server, {**body, "echo": False})
    with pytest.raises(CompatibilityError, match="gives no log-probabilities .* use 'generate'"):
        connect(server, tokenizer, scoring="echo")


@pytest.mark.parametrize(("owned_by", "version", "answers"), [
    ("vllm", "0.99", "ids"), ("llamacpp", "b1-abc", "ids"), ("sglang", "loop-1", "ids"),
    ("someone", "loop-1", "text")])
def test_identity_says_what_the_rows_depend_on(server, tokenizer, owned_by, version, answers):
    server.owned_by = owned_by
    backend = connect(server, tokenizer)
    assert backend.identity == {
        "url": server.url, "model": "tiny", "source": "/models/tiny", "engine": owned_by,
        "version": version, "max_len": 4096, "tokenizer": "ids", "answers": answers,
        "prompt": "ids", "scoring": "generate"}
    assert backend.name == "server"


def test_an_unknown_context_is_said(server, tokenizer, caplog):
    server.max_len = None
    with caplog.at_level(logging.WARNING):
        assert connect(server, tokenizer).served.max_len is None
    assert "does not say how long a context it serves tiny with" in caplog.text


def test_the_key_is_sent_and_shown_nowhere(server, tokenizer, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    caplog.set_level(logging.DEBUG)
    backend = connect(server, tokenizer, key_variable="MY_KEY")
    backend.score(passkeys(tokenizer, trials=1))
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    told = [str(backend.identity), repr(backend.options), repr(backend.served)]
    for fault in ("locked", "quoting"):
        server.always = fault
        with pytest.raises(ServerError) as error:
            backend.score(passkeys(tokenizer, trials=1))
        told.append(str(error.value))
    assert "of the environment variable MY_KEY was sent" in told[-2] and "[key]" in told[-1]
    assert KEY not in "".join(told) + caplog.text


def test_without_a_key_none_is_sent(server, tokenizer, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    backend = connect(server, tokenizer)
    server.always = "locked"
    with pytest.raises(ServerError, match="OPENAI_API_KEY is unset, so none was sent"):
        backend.score(passkeys(tokenizer, trials=1))
    assert "Authorization" not in server.headers[-1]


def test_a_key_that_no_header_holds_is_refused_unseen(tokenizer, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX: y")
    with pytest.raises(RecipeError, match="holds characters that no HTTP header may") as error:
        ServerBackend.open("http://127.0.0.1:9", tokenizer)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://[::1",
                                 "http://host:port"])
def test_addresses_are_of_http(tokenizer, url):
    with pytest.raises(RecipeError, match="is no address of HTTP"):
        ServerBackend.open(url, tokenizer)


@pytest.mark.parametrize("url", ["http://me:pw@host", "http://host/v1?key=pw"])
def test_addresses_hold_no_secrets(tokenizer, url):
    with pytest.raises(RecipeError, match="holds a name, a password or a query") as error:
        ServerBackend.open(url, tokenizer)
    assert "pw" not in str(error.value)


def test_addresses_may_end_with_the_version(server, tokenizer):
    server.url += "/v1/"
    assert connect(server, tokenizer).identity["url"] == server.url.removesuffix("/v1/")


def test_nobody_there_is_one_clear_error(tokenizer):
    options = ServerOptions(retries=1, backoff_seconds=0.001)
    with pytest.raises(ServerError, match="v1/models: failed 2 times, at last with Conn.*refused"):
        ServerBackend.open("http://127.0.0.1:9", tokenizer, options)


def test_another_kind_of_server_is_said(server, tokenizer):
    server.models = lambda: {"detail": "hello"}
    with pytest.raises(ServerError, match="no list of models but .*hello"):
        connect(server, tokenizer)


@pytest.mark.parametrize(("options", "told"), [
    ({"prompt": "chat"}, "prompt: 'chat' is not one of ids, text"),
    ({"scoring": "x"}, "scoring: 'x' is not one of"), ({"concurrency": 0}, "concurrency: 0"),
    ({"slack": -1}, "slack: -1"), ({"retries": -1}, "retries: -1"),
    ({"timeout_seconds": math.nan}, "timeout_seconds: nan"),
    ({"prompt": "text", "scoring": "echo"}, "'echo' needs prompt 'ids'")])
def test_options_are_checked(options, told):
    with pytest.raises(RecipeError, match=told):
        ServerOptions(**options)


def test_no_torch_is_imported():
    code = ("import sys, extend.evaluate.backends.server\n"
            "print([m for m in ('torch', 'transformers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_stage_through_a_server_gives_the_rows_of_the_model(real, model_dir, tmp_path):
    grid = {"tasks": ["passkey"], "lengths": [400], "depths": 2, "trials": 2}
    here = evaluate(model_dir, tmp_path / "here", **grid)
    there = evaluate(model_dir, tmp_path / "there", server={"url": real.url, **FAST}, **grid)
    mine, theirs = (json.loads(path.read_text()) for path in (here, there))
    for row, other in zip(mine["rows"], theirs["rows"], strict=True):
        assert (row["correct"], row["n"], row["prompt_sha256"]) == (
            other["correct"], other["n"], other["prompt_sha256"])
        assert other["answer_loss"] is None
    assert theirs["model"]["server"]["url"] == real.url and theirs["model"]["device"] is None


@pytest.mark.parametrize(("given", "told"), [
    ({"adapter": "./x"}, "adapter is ./x and server is given"),
    ({"nproc": 2}, "nproc is 2 and server"), ({"chunk": 64}, "chunk is 64 and server"),
    ({"server": {"url": "http://127.0.0.1:9", "modle": "x"}}, "did you mean 'model'"),
    ({"server": {"model": "x"}}, "has no url")])
def test_what_a_server_has_no_use_for_is_refused(given, told, tokenizer):
    options = {"device": "auto", "dtype": "auto", "chunk": None, "nproc": 1,
               "context_parallel": 1, "server": "http://127.0.0.1:9", **given}
    others = {"adapter": options.pop("adapter", None)}
    with pytest.raises(RecipeError, match=told):
        make_runner(tokenizer, [], **options, others=others)
    with pytest.raises(RecipeError, match="nproc is 2 and context_parallel 2"):
        make_runner(tokenizer, [], others={}, **{**options, "server": None, "nproc": 2,
                                                 "context_parallel": 2})
