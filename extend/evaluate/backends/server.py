"""A model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp and their like.

Prompts go to POST /v1/completions as token ids, so that the server reads the very ids that a task
built; `usage.prompt_tokens` of every answer must say as many. Imports no torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from extend.errors import CompatibilityError, ServerError
from extend.evaluate.backends.backend import AnswerScore, Generation
from extend.evaluate.backends.completion import Completion, Echo, echoed, read_completion
from extend.evaluate.backends.dialects import GREEDY
from extend.evaluate.backends.http import JsonClient, Rejected
from extend.evaluate.backends.served import Served, ServerOptions, find_served, prompt_text
from extend.evaluate.tasks.task import Prompt
from extend.haystack import prefix_ids

if TYPE_CHECKING:
    import numpy as np

Answer = TypeVar("Answer")
_GENERATED = frozenset({"exact", "generated"})
_WITH_LOSSES = _GENERATED | {"loss"}


class ServerBackend:
    """Asks a server for what LocalBackend computes.

    An answer is correct where the server, asked for as many tokens as the answer has, writes its
    ids. That is what teacher forcing says too: the first choices are the answer exactly when each
    is right given the right ones before it. It can differ in three ways. The server computes in
    another precision and order, so near ties fall otherwise. Where it returns no ids, texts are
    compared without white space at their ends: the same text in other tokens is right, and one
    that takes more tokens than the answer is cut and wrong. And where it takes text alone, it
    makes the ids itself. `identity` says which of these holds.

    With `scoring="echo"` the server returns the log-probability of every token of prompt and
    answer (vLLM and SGLang do): that is teacher forcing, with losses. An answer token is then the
    first choice where none is likelier. It costs logits for the whole prompt.

    Attributes:
        measures: names of the measures that this server can answer.
    """

    name = "server"

    def __init__(self, client: JsonClient, tokenizer: Any, served: Served,
                 options: ServerOptions):
        self.tokenizer, self.served, self.options = tokenizer, served, options
        self._client = client
        self._special = max(1, len(prefix_ids(tokenizer)))
        self.measures = _WITH_LOSSES if options.scoring == "echo" else _GENERATED

    @classmethod
    def open(cls, url: str, tokenizer: Any, options: ServerOptions | None = None
             ) -> "ServerBackend":
        """Find the model, check that its tokenizer is this one, and try what will be asked.

        Raises:
            RecipeError: a wrong option or address.
            CompatibilityError: another tokenizer, no such model, or a server that cannot do what
                the options ask.
            ServerError: the server does not answer, or not what it was asked.
        """
        options = options or ServerOptions()
        client = JsonClient(url, key_variable=options.key_variable,
                            timeout_seconds=options.timeout_seconds, retries=options.retries,
                            backoff_seconds=options.backoff_seconds)
        return cls(client, tokenizer, find_served(client, tokenizer, options), options)

    @property
    def identity(self) -> dict[str, Any]:
        """What the rows depend on, for the results and for the file of finished rows; JSON."""
        return {**self.served.to_json(), "prompt": self.options.prompt,
                "scoring": self.options.scoring}

    def check(self, tasks: Iterable[tuple[str, str, int | None]]) -> None:
        """Refuse what cannot be answered, before hours of work.

        Args:
            tasks: of each cell the task's name and measure, and the cell's length or None.

        Raises:
            CompatibilityError: a measure that this server does not serve, or a length that it
                does not read.
        """
        for name, measure, length in tasks:
            if measure not in self.measures:
                hint = ("scoring 'echo' gives losses, where the server offers it"
                        if measure in _WITH_LOSSES else "evaluate it in process")
                raise CompatibilityError(f"{name}: {measure!r} is not measured through a server "
                                         f"with scoring {self.options.scoring!r}; {hint}")
            if length is not None:
                echoes = self.options.scoring == "echo" and measure != "generated"
                self._check_length(length + echoes, name)

    def score(self, prompts: Sequence[Prompt]) -> list[AnswerScore]:
        """Score known answers.

        Returns:
            Scores in the order of `prompts`; nll is None unless the scoring is `echo`.

        Raises:
            CompatibilityError: a prompt that is longer than the server's context.
            ServerError: the server does not answer, or not what it was asked.
        """
        return self._ask_all(self._score_echo if self.options.scoring == "echo"
                             else self._score_written, prompts)

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Let the model go on from each prompt; errors as for `score`."""
        return self._ask_all(self._generate, prompts)

    def reference(self, path: Path | str) -> "ServerBackend":
        """Refused: another model is another evaluation.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError(f"{path}: a server is asked for one model; evaluate this one in a "
                                 "run of its own, or both in process")

    def token_losses(self, rows: Sequence[Sequence[int]]) -> "list[np.ndarray]":
        """Of each row the loss of every token but the first, fp32 [len - 1], in nats.

        Raises:
            CompatibilityError: the scoring is not `echo`, or a row is too long.
            ServerError: the server does not answer, or not what it was asked.
        """
        import numpy as np

        if self.options.scoring != "echo":
            raise CompatibilityError("losses through a server need scoring 'echo'; give it where "
                                     "the server offers it, or evaluate in process")
        losses = self._ask_all(lambda row: [-p for p in self._echo(row).logprobs[1:]], rows)
        return [np.asarray(row, dtype=np.float32) for row in losses]

    def _score_written(self, prompt: Prompt) -> AnswerScore:
        cut = len(prompt.ids) - prompt.answer_len
        wanted = list(prompt.ids[cut:])
        reply = self._complete(prompt.ids[:cut], prompt.answer_len)
        if reply.ids is None:
            correct = reply.text.strip() == self._decode(wanted).strip()
        else:
            correct = list(reply.ids) == wanted
        return AnswerScore(self._ids_of(reply), correct, None, self._details(cut, reply))

    def _score_echo(self, prompt: Prompt) -> AnswerScore:
        reply, first = self._echo(prompt.ids), len(prompt.ids) - prompt.answer_len
        choices = [token if reply.is_first[first + i] else self._id_of(reply.likeliest[first + i])
                   for i, token in enumerate(prompt.ids[first:])]
        return AnswerScore(choices, all(reply.is_first[first:]), -sum(reply.logprobs[first:]),
                           self._details(len(prompt.ids), reply.completion))

    def _generate(self, prompt: Prompt) -> Generation:
        reply = self._complete(prompt.ids, prompt.max_new_tokens)
        ids = self._ids_of(reply)
        if reply.finished and ids and ids[-1] in self.tokenizer.all_special_ids:
            ids = ids[:-1]
        text = reply.text if reply.ids is None else self._decode(ids)
        return Generation(ids, text, reply.finished, self._details(len(prompt.ids), reply))

    def _complete(self, ids: Sequence[int], budget: int) -> Completion:
        return read_completion(self._post(ids, budget, {}), budget)

    def _echo(self, ids: Sequence[int]) -> Echo:
        # A token more than wanted, also in the context: not every server takes a budget of 0.
        fields = {"echo": True, "logprobs": 1, **(self.served.dialect.echo or {})}
        return echoed(self._post(ids, 1, fields), len(ids))

    def _post(self, ids: Sequence[int], budget: int, fields: Mapping[str, Any]) -> Any:
        self._check_length(len(ids) + budget, "a prompt")
        ids = [int(token) for token in ids]
        prompt = ids if self.options.prompt == "ids" else prompt_text(self.tokenizer, ids)
        body = {"model": self.served.model, "prompt": prompt, "max_tokens": budget, **GREEDY,
                **self.served.dialect.fields, **fields}
        try:
            answer = self._client.post("/v1/completions", body)
        except Rejected as error:
            raise _explain(error, len(ids), budget) from None
        self._check_count(answer, len(ids))
        return answer

    def _check_length(self, length: int, what: str) -> None:
        longest = self.served.max_len
        if longest is not None and length > longest:
            raise CompatibilityError(
                f"{what}: {length} tokens with the answer, but {self.served.model} is served with "
                f"a context of {longest}; start the server with a longer one (see "
                "docs/evaluation-servers.md), or ask shorter lengths")

    def _check_count(self, answer: Any, sent: int) -> None:
        """The server has read as many tokens as the task built."""
        usage = answer.get("usage") if isinstance(answer, Mapping) else None
        count = (usage or {}).get("prompt_tokens")
        if not isinstance(count, int):
            raise ServerError(f"{self.served.url}: an answer without usage.prompt_tokens, so that "
                              "the length of the prompt cannot be checked; use a server that "
                              "reports it")
        slack = 0 if self.options.prompt == "ids" else self._special + self.options.slack
        if abs(count - sent) > slack:
            advice = ("it has cut or changed the prompt" if self.options.prompt == "ids" else
                      "its tokenizer cuts the text otherwise; raise slack to accept and record it")
            raise ServerError(f"{self.served.url}: read {count} tokens of a prompt of {sent}; "
                              f"{advice}")

    def _details(self, sent: int, reply: Completion) -> dict[str, Any]:
        """Both lengths, where the server has made the ids itself."""
        if self.options.prompt == "ids":
            return {}
        return {"prompt_tokens": sent, "server_tokens": reply.prompt_tokens}

    def _ids_of(self, reply: Completion) -> list[int]:
        return list(reply.ids) if reply.ids is not None else self._encode(reply.text)

    def _id_of(self, token: str) -> int:
        """A token as a server names it in log-probabilities: its text, or `token_id:N`."""
        number = token.removeprefix("token_id:")
        if number != token and number.isdecimal():
            return int(number)
        return (self._encode(token) or [0])[0]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _ask_all(self, ask: Callable[[Any], Answer], prompts: Sequence[Any]) -> list[Answer]:
        """Answers in the order of the prompts, several asked at once; after a failure no more."""
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            asked = [pool.submit(ask, prompt) for prompt in prompts]
            try:
                done, _ = wait(asked, return_when=FIRST_EXCEPTION)
            finally:
                for future in asked:
                    future.cancel()
            for future in done:
                future.result()
        return [future.result() for future in asked]


def _explain(error: Rejected, sent: int, budget: int) -> Exception:
    """A refusal in the words of this toolkit, where it is of a known kind."""
    text = error.text.lower()
    if "context" in text and any(word in text for word in ("length", "size", "longer", "exceed")):
        return CompatibilityError(
            f"the server's context is shorter than a prompt of {sent} tokens with {budget} for "
            f"the answer ({error.text}); start it with a longer one (see "
            "docs/evaluation-servers.md), or ask shorter lengths")
    return error
