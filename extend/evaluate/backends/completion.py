"""Reading the answers of /v1/completions, and refusing those that are not whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extend.errors import ServerError

_SHOWN_CHARACTERS = 200
_ENDS = ("stop", "eos", "length", None)  # None: the server does not say


@dataclass(frozen=True, slots=True)
class Completion:
    """What a server wrote.

    Attributes:
        ids: where it returns them; they may end with the token that ended the answer.
        finished: whether it ended by itself, within its budget.
        prompt_tokens: what it has read, by its own count.
    """

    text: str
    ids: tuple[int, ...] | None
    finished: bool
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Echo:
    """The log-probabilities of a prompt's own tokens, natural; that of the first is NaN.

    Attributes:
        is_first: of each token whether none is likelier in its place.
        likeliest: the server's name of the likeliest token in each place, "" for the first.
    """

    logprobs: list[float]
    is_first: list[bool]
    likeliest: list[str]
    completion: Completion


def read_completion(answer: Any, budget: int) -> Completion:
    """Read an answer to a prompt.

    Raises:
        ServerError: no choice, no text, an end for another reason than an end token or the
            budget, or an answer that was cut before its budget was used up.
    """
    choice = _choice(answer)
    text, reason = choice.get("text"), choice.get("finish_reason")
    if not isinstance(text, str):
        raise _unreadable("no text in its first choice", answer)
    if reason not in _ENDS:
        raise _unreadable(f"an answer that ended with {reason!r} instead of an end token or its "
                          "budget", answer)
    usage = answer.get("usage") or {}
    written = usage.get("completion_tokens")
    if reason == "length" and isinstance(written, int) and written < budget:
        raise _unreadable(f"an answer that was cut after {written} of {budget} tokens; its context "
                          "is too short for the prompt and its answer", answer)
    finished = reason in ("stop", "eos") or (reason is None and isinstance(written, int)
                                             and written < budget)
    return Completion(text, _token_ids(choice), finished, usage.get("prompt_tokens", 0))


def _choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, Sequence) or len(choices) != 1 or \
            not isinstance(choices[0], Mapping):
        raise _unreadable("not exactly one choice", answer)
    return choices[0]


def _token_ids(choice: Mapping[str, Any]) -> tuple[int, ...] | None:
    """vLLM and SGLang return a list of ids; llama.cpp names them beside log-probabilities."""
    ids = choice.get("token_ids")
    if ids is None:
        content = (choice.get("logprobs") or {}).get("content")
        ids = None if content is None else [entry.get("id") for entry in content]
    if ids is None or not all(isinstance(token, int) for token in ids):
        return None
    return tuple(ids)


def echoed(answer: Any, length: int) -> Echo:
    """Read the log-probabilities of a prompt of `length` tokens that the server echoes.

    Raises:
        ServerError: they are not there, or not of each token.
    """
    completion = read_completion(answer, 1)
    logprobs = _choice(answer).get("logprobs") or {}
    values = list(logprobs.get("token_logprobs") or ())[:length]
    tops = list(logprobs.get("top_logprobs") or ())[:length]
    if len(values) < length or len(tops) < length or \
            not all(isinstance(value, (int, float)) for value in values[1:]):
        raise _unreadable(f"log-probabilities of {len(values)} tokens instead of the {length} of "
                          "the prompt; use scoring 'generate' with this server", answer)
    is_first, likeliest = [False], [""]
    for value, top in zip(values[1:], tops[1:], strict=True):
        best = max(top or {"": value}, key=(top or {"": value}).get)
        is_first.append(value >= (top or {"": value})[best])
        likeliest.append(best)
    return Echo([float("nan"), *map(float, values[1:])], is_first, likeliest, completion)


def _unreadable(what: str, answer: Any) -> ServerError:
    return ServerError(f"the server answered with {what}: {str(answer)[:_SHOWN_CHARACTERS]}")
