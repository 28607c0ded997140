"""What a server serves, and whether it can answer what will be asked: found out before a run."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from extend.errors import CompatibilityError, RecipeError, ServerError
from extend.evaluate.backends.completion import echoed, read_completion
from extend.evaluate.backends.dialects import DIALECTS, GREEDY, Dialect
from extend.evaluate.backends.http import JsonClient, Rejected
from extend.haystack import encode, prefix_ids

logger = logging.getLogger(__name__)
_PROBE = ("The 1234567 quick brown foxes; naïve café, 你好, мир!\n\n"
          "\tdef f(x):\n    return x ** 2  # 0xFF\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a server is asked.

    Attributes:
        model: name under which it serves the model; it may be left out where it serves one.
        prompt: `ids` sends token ids. `text` sends their text, for servers that take nothing
            else; the lengths that they count are then recorded beside those asked for.
        scoring: `generate` lets the server write known answers; `echo` asks for the
            log-probabilities of prompt and answer, which loss tasks need.
        concurrency: requests at once.
        slack: tokens by which the server's count may differ with `text`, beside special tokens.
        key_variable, timeout_seconds, retries, backoff_seconds: see
            `extend.evaluate.backends.http.JsonClient`.

    Raises:
        RecipeError: a value that is not accepted.
    """

    model: str | None = None
    prompt: Literal["ids", "text"] = "ids"
    scoring: Literal["generate", "echo"] = "generate"
    concurrency: int = 8
    slack: int = 0
    key_variable: str = "OPENAI_API_KEY"
    timeout_seconds: float = 3600.0
    retries: int = 5
    backoff_seconds: float = 1.0

    def __post_init__(self) -> None:
        for name, accepted in (("prompt", ("ids", "text")), ("scoring", ("generate", "echo"))):
            if getattr(self, name) not in accepted:
                raise RecipeError(f"server {name}: {getattr(self, name)!r} is not one of "
                                  f"{', '.join(accepted)}")
        for name, least in (("concurrency", 1), ("slack", 0), ("timeout_seconds", 0.001),
                            ("retries", 0), ("backoff_seconds", 0)):
            if not getattr(self, name) >= least:
                raise RecipeError(f"server {name}: {getattr(self, name)!r} is less than {least}")
        if self.prompt == "text" and self.scoring == "echo":
            raise RecipeError("server scoring 'echo' needs prompt 'ids': the tokens of a text are "
                              "the server's own, and could not be told apart")


@dataclass(frozen=True, slots=True)
class Served:
    """A model behind a server.

    Attributes:
        model: its name there.
        source: path or repository that the server says it comes from, or None.
        engine: vllm, sglang or llamacpp, or what else the server calls itself.
        version: of the server, where it tells.
        max_len: tokens of prompt and answer together, where it tells.
        tokenizer: how it was compared: `ids` of a text, or their `count`.
        answers: whether answers come as `ids` or as `text` alone.
    """

    url: str
    model: str
    source: str | None
    engine: str
    version: str | None
    max_len: int | None
    tokenizer: str
    answers: str
    dialect: Dialect

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (
            "url", "model", "source", "engine", "version", "max_len", "tokenizer", "answers")}


def find_served(client: JsonClient, tokenizer: Any, options: ServerOptions) -> Served:
    """Look up the model and try each kind of request once.

    Raises:
        RecipeError: no model is named where the server has several.
        CompatibilityError: no such model, another tokenizer, or a server that does not do what the
            options ask.
        ServerError: the server does not answer, or not what it was asked.
    """
    entry = _choose_model(client.get("/v1/models"), options.model, client.root)
    engine = str(entry.get("owned_by") or "unknown")
    dialect = DIALECTS.get(engine, Dialect())
    if options.scoring == "echo" and dialect.echo is None:
        raise CompatibilityError(f"{client.root}: {engine} gives no log-probabilities of a prompt, "
                                 "which scoring 'echo' asks for; use 'generate'")
    probe = _Probe(client, tokenizer, entry["id"], dialect, options)
    tokens = probe.compare_tokenizers()
    reply = probe.complete()
    if options.scoring == "echo":
        probe.echo()
    meta = entry.get("meta") or {}
    length = entry.get("max_model_len") or meta.get("n_ctx")
    if length is None:
        logger.warning("%s does not say how long a context it serves %s with; a prompt that is "
                       "too long shows only when it is sent", client.root, entry["id"])
    return Served(client.root, entry["id"], entry.get("root"), engine,
                  _version(client, dialect) or reply[1], length, tokens, reply[0], dialect)


def _choose_model(listing: Any, name: str | None, where: str) -> Mapping[str, Any]:
    """The entry of the asked model, or of the only one."""
    entries = listing.get("data") if isinstance(listing, Mapping) else None
    if not isinstance(entries, Sequence):
        raise ServerError(f"{where}/v1/models: no list of models but {str(listing)[:200]}; give "
                          "the address of an OpenAI-compatible server")
    known = {entry["id"]: entry for entry in entries
             if isinstance(entry, Mapping) and isinstance(entry.get("id"), str)}
    if name is None and len(known) != 1:
        raise RecipeError(f"{where} serves {len(known)} models ({', '.join(known) or 'none'}); "
                          "name one")
    name = name or next(iter(known))
    entry = next((e for e in known.values() if name in (e["id"], *(e.get("aliases") or ()))), None)
    if known and entry is None:
        raise CompatibilityError(f"{where} serves no model {name!r} but {', '.join(known)}")
    # An adapter is listed beside its base model and says less.
    base = known.get((entry or {}).get("parent"), {})
    return {**base, **{key: value for key, value in (entry or {}).items() if value is not None},
            "id": name}


def _version(client: JsonClient, dialect: Dialect) -> str | None:
    if dialect.version is None:
        return None
    path, key = dialect.version
    try:
        found = client.get(path)
    except ServerError:  # not all versions have it, and some keep it for administrators
        return None
    return str(found[key]) if isinstance(found, Mapping) and key in found else None


@dataclass(frozen=True, slots=True)
class _Probe:
    """Small requests that show what the server can do."""

    client: JsonClient
    tokenizer: Any
    model: str
    dialect: Dialect
    options: ServerOptions

    def compare_tokenizers(self) -> str:
        """Ids mean the same on both sides: `ids` where the server shows them, else `count`."""
        own = encode(self.tokenizer, _PROBE)
        try:
            # vLLM and SGLang read `prompt`, llama.cpp `content`.
            shown = self.client.post("/tokenize", {
                "model": self.model, "prompt": _PROBE, "add_special_tokens": False,
                "content": _PROBE, "add_special": False})
        except ServerError:  # whatever is wrong, the requests that follow tell
            shown = None
        if isinstance(shown, Mapping) and isinstance(shown.get("tokens"), list):
            self._same(shown["tokens"] == own, len(own), len(shown["tokens"]))
            return "ids"
        answer = self._post(_PROBE, 1)
        found = answer["usage"]["prompt_tokens"]
        accepted = (len(own), len(self.tokenizer(_PROBE)["input_ids"]), len(own) + 1)
        self._same(found in accepted, len(own), found)
        return "count"

    def _same(self, same: bool, own: int, found: int) -> None:
        if not same:
            raise CompatibilityError(
                f"{self.client.root}: its tokenizer is not that of the model directory: a text of "
                f"{own} tokens here has {found} there, or others; give the directory of the model "
                "that is served")

    def complete(self) -> tuple[str, str | None]:
        """Whether answers come as `ids` or as `text`, and the fingerprint that came with one."""
        ids = [*prefix_ids(self.tokenizer), *encode(self.tokenizer, _PROBE)]
        if self.options.prompt == "text":
            answer = self._post(prompt_text(self.tokenizer, ids), 1)
        else:
            answer = self._post_ids(ids)
        kind = "text" if read_completion(answer, 1).ids is None else "ids"
        return kind, answer.get("system_fingerprint")

    def _post_ids(self, ids: list[int], **fields: Any) -> Any:
        try:
            answer = self._post(ids, 1, **fields)
        except Rejected as error:
            raise CompatibilityError(f"{self.client.root}: refuses token ids as a prompt "
                                     f"({error.text}); let it have text (server prompt 'text') if "
                                     "it takes nothing else") from None
        if answer["usage"]["prompt_tokens"] != len(ids):
            raise CompatibilityError(f"{self.client.root}: read {answer['usage']['prompt_tokens']} "
                                     f"tokens where {len(ids)} ids were sent; it does not take "
                                     "prompts as they are, so use another server")
        return answer

    def echo(self) -> None:
        ids = [*prefix_ids(self.tokenizer), *encode(self.tokenizer, _PROBE)]
        try:
            echoed(self._post(ids, 1, echo=True, logprobs=1, **(self.dialect.echo or {})), len(ids))
        except (Rejected, ServerError) as error:
            raise CompatibilityError(f"{self.client.root}: gives no log-probabilities of a prompt, "
                                     f"which scoring 'echo' asks for ({error}); use 'generate'"
                                     ) from None

    def _post(self, prompt: list[int] | str, budget: int, **fields: Any) -> Any:
        answer = self.client.post("/v1/completions", {
            "model": self.model, "prompt": prompt, "max_tokens": budget, **GREEDY,
            **self.dialect.fields, **fields})
        usage = answer.get("usage") if isinstance(answer, Mapping) else None
        if not isinstance((usage or {}).get("prompt_tokens"), int):
            raise ServerError(f"{self.client.root}: an answer without usage.prompt_tokens, so that "
                              "the length of a prompt cannot be checked; use a server that reports "
                              "it")
        return answer


def prompt_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a prompt, without the special tokens that a tokenizer adds by itself.

    Raises:
        CompatibilityError: nothing else is in the prompt.
    """
    prefix = prefix_ids(tokenizer)
    rest = list(ids[len(prefix):]) if list(ids[:len(prefix)]) == prefix else list(ids)
    text = tokenizer.decode(rest, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not text:
        raise CompatibilityError("a prompt of special tokens alone has no text to send; use server "
                                 "prompt 'ids'")
    return text
