"""What a measure may ask of whatever runs the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from extend.evaluate.tasks.task import Prompt


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """What a model makes of one answer.

    Attributes:
        predicted: its first choice at each answer position, given the right tokens before it.
        correct: whether all of them are right.
        nll: sum over the answer of the negative log-likelihoods, in nats; None where whatever runs
            the model does not tell.
        details: what else its entry in the results should say; JSON values.
    """

    predicted: list[int]
    correct: bool
    nll: float | None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote, always its first choice.

    Attributes:
        ids: without the token that ended it.
        text: of `ids`, without special tokens.
        finished: whether it ended by itself, within its budget.
        details: what else its entry in the results should say; JSON values.
    """

    ids: list[int]
    text: str
    finished: bool
    details: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """Runs a model. A measure that needs more than this asks for it by `name`.

    Attributes:
        name: local, ring or server.
    """

    name: str

    def score(self, prompts: Sequence[Prompt]) -> list[AnswerScore]:
        """Score known answers by teacher forcing."""
        ...

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Let the model go on from each prompt for at most its `max_new_tokens`."""
        ...

    def reference(self, path: Path | str) -> "Backend":
        """Another model, to compare with.

        Raises:
            CompatibilityError: this backend runs one model alone.
        """
        ...
