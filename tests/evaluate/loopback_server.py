"""An OpenAI-compatible server on this machine, with faults on demand."""

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class PlainModel:
    """transformers' own greedy generation and logits, with eager attention: the oracle."""

    def __init__(self, directory: Any):
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager")
        self._lock = threading.Lock()

    def write(self, ids: Sequence[int], budget: int) -> list[int]:
        prompt = torch.tensor([ids])
        with self._lock, torch.no_grad():
            out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt),
                                      max_new_tokens=budget, do_sample=False, eos_token_id=1,
                                      pad_token_id=0)
        return out[0, len(ids):].tolist()

    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        with self._lock, torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


class Scripted:
    """Writes the same at once, whatever the prompt."""

    def __init__(self, ids: Sequence[int]):
        self.ids = list(ids)

    def write(self, ids: Sequence[int], budget: int) -> list[int]:
        return self.ids[:budget]


@dataclass
class Loopback:
    """What the server is and does; a test sets it, the server's threads read it.

    Attributes:
        owned_by: vllm, sglang or llamacpp speak as those do; anything else returns text alone.
        takes_ids: False refuses ids as a prompt.
        faults: taken one by one by requests for completions, the first first.
        always: a fault of every request for completions.
        bodies, headers: of the requests for completions.
    """

    model: Any
    tokenizer: Any
    owned_by: str = "vllm"
    names: Sequence[str] = ("tiny",)
    max_len: int | None = 4096
    takes_ids: bool = True
    tokenizes: bool = True
    adds_bos: bool = True
    miscount: int = 0
    faults: list[str] = field(default_factory=list)
    always: str = ""
    delay_seconds: float = 0.0
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    active: int = 0
    peak: int = 0

    def __enter__(self) -> "Loopback":
        handler = type("Handler", (_Handler,), {"state": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def models(self) -> dict:
        entry = {"object": "model", "owned_by": self.owned_by, "root": "/models/tiny"}
        if self.max_len is not None:
            entry |= {"meta": {"n_ctx": self.max_len}} if self.owned_by == "llamacpp" else {
                "max_model_len": self.max_len}
        return {"object": "list", "data": [{"id": name, **entry} for name in self.names]}

    def complete(self, body: dict) -> dict:
        prompt, budget = body["prompt"], body["max_tokens"]
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt, add_special_tokens=self.adds_bos)["input_ids"]
        else:
            ids = prompt
        written = self.model.write(ids, budget)
        ended = written[-1] == 1
        choice = {"index": 0, "finish_reason": "stop" if ended else "length",
                  "text": self.tokenizer.decode(written, skip_special_tokens=True),
                  "logprobs": None}
        if self.owned_by in ("vllm", "sglang") and body.get("return_token_ids"):
            choice["token_ids"] = written
        if self.owned_by == "llamacpp" and body.get("logprobs"):
            choice["logprobs"] = {"content": [{"id": token} for token in written]}
        if body.get("echo"):
            choice["logprobs"] = self._echo([*ids, *written])
        return {"choices": [choice], "model": body["model"], "system_fingerprint": "loop-1",
                "usage": {"prompt_tokens": len(ids) + self.miscount,
                          "completion_tokens": len(written)}}

    def _echo(self, ids: list[int]) -> dict:
        table = self.model.logprobs(ids)[:-1]
        own = table[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
        best = [{f"token_id:{i}": v} for v, i in zip(*(t.tolist() for t in table.max(-1)))]
        tops = [{**top, f"token_id:{i}": v} for top, i, v in zip(best, ids[1:], own)]
        return {"token_logprobs": [None, *own], "top_logprobs": [None, *tops]}


class _Handler(BaseHTTPRequestHandler):
    state: Loopback
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.state.asked.append(self.path)
        known = {"/v1/models": self.state.models(), "/version": {"version": "0.99"},
                 "/props": {"build_info": "b1-abc"}}
        self._send(*((200, known[self.path]) if self.path in known else (404, {"detail": "none"})))

    def do_POST(self) -> None:
        state = self.state
        state.asked.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize" and state.tokenizes:
            return self._send(200, {"tokens": state.tokenizer(
                body["prompt"], add_special_tokens=False)["input_ids"]})
        if self.path != "/v1/completions":
            return self._send(404, {"detail": "Not Found"})
        state.bodies.append(body)
        state.headers.append(dict(self.headers))
        fault = state.faults.pop(0) if state.faults else state.always
        if fault:
            return getattr(self, "_" + fault)(body)
        if isinstance(body["prompt"], list) and not state.takes_ids:
            return self._send(400, {"detail": "prompt must be a string."})
        state.active += 1
        state.peak = max(state.peak, state.active)
        time.sleep(state.delay_seconds)
        answer = state.complete(body)
        state.active -= 1
        return self._send(200, answer)

    def _send(self, status: int, data: Any, **headers: str) -> None:
        text = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(text)), **given}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def _busy(self, body: dict) -> None:
        self._send(429, {"error": "slow down"}, Retry_After="0.01")

    def _broken(self, body: dict) -> None:
        self._send(500, {"error": "engine died"})

    def _hang(self, body: dict) -> None:
        time.sleep(0.6)

    def _drop(self, body: dict) -> None:
        self.close_connection = True  # no answer at all

    def _short(self, body: dict) -> None:
        self._send(200, b'{"choices": [{"te', Content_Length="500")
        self.close_connection = True

    def _garbage(self, body: dict) -> None:
        self._send(200, b'{"choices": [{"te')

    def _empty(self, body: dict) -> None:
        self._send(200, {"choices": [], "usage": {"prompt_tokens": len(body["prompt"])}})

    def _uncounted(self, body: dict) -> None:
        self._send(200, {"choices": [{"text": "x", "finish_reason": "stop"}]})

    def _ending(self, body: dict, **changes: Any) -> None:
        answer = self.state.complete(body)
        answer["choices"][0] |= changes
        self._send(200, answer)

    def _aborted(self, body: dict) -> None:
        self._ending(body, finish_reason="abort")

    def _textless(self, body: dict) -> None:
        self._ending(body, text=None)

    def _blank(self, body: dict) -> None:
        self._ending(body, text="", token_ids=[], finish_reason="stop")

    def _cut(self, body: dict) -> None:
        answer = self.state.complete(body)
        answer["usage"]["completion_tokens"] = body["max_tokens"] - 1
        answer["choices"][0]["finish_reason"] = "length"
        self._send(200, answer)

    def _context(self, body: dict) -> None:
        self._send(400, {"error": {"message": "This model's maximum context length is 64 tokens."}})

    def _locked(self, body: dict) -> None:
        self._send(401, {"error": f"Incorrect key {self.headers['Authorization']}"})

    def _quoting(self, body: dict) -> None:
        self._send(422, {"error": f"bad request of {self.headers['Authorization']}"})

    def _moved(self, body: dict) -> None:
        self._send(302, {}, Location="http://127.0.0.1:9/v1/completions")
