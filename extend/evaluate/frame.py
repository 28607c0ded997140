"""How a prompt is put to a model: as plain text, or as a user's turn of its chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from extend.errors import CompatibilityError, RecipeError
from extend.haystack import encode, prefix_ids, split_answer

Template = Literal["auto", "base", "chat"]
TEMPLATES: tuple[Template, ...] = ("auto", "base", "chat")
_MARK = "\u2063extend\u2063text\u2063"  # stands for the user's text; in no template
_DATE = "26 Jul 2024"  # for templates that would otherwise write today's


@dataclass(frozen=True, slots=True)
class Frame:
    """A tokenizer, and what stands before and after the user's text.

    A prompt is `head`, then encoded text, then what `ask` returns.

    Attributes:
        chat: whether the text is a turn of a chat; otherwise the model just goes on writing.
        head: ids before the text: a BOS, or the template up to the text.
        tail: ids between the text and the answer; none for plain text.
    """

    tokenizer: Any
    chat: bool
    head: tuple[int, ...]
    tail: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, template: Template = "auto") -> "Frame":
        """The frame of a tokenizer: plain text for `auto` and `base`, its template for `chat`.

        Raises:
            RecipeError: no such template.
            CompatibilityError: `chat` for a tokenizer without a chat template, or with one that
                leaves the user's text out.
        """
        if template not in TEMPLATES:
            raise RecipeError(f"template: unknown {template!r}; choose one of "
                              f"{', '.join(TEMPLATES)}")
        if template != "chat":
            return cls(tokenizer, False, tuple(prefix_ids(tokenizer)), ())
        before, after = _split_template(tokenizer)
        return cls(tokenizer, True, tuple(encode(tokenizer, before)),
                   tuple(encode(tokenizer, after)))

    @property
    def prefix(self) -> tuple[int, ...]:
        """The special tokens before any plain text: a BOS, or none."""
        return tuple(prefix_ids(self.tokenizer))

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without special tokens."""
        return encode(self.tokenizer, text)

    def ask(self, question: str, prefill: str, answer: str = "") -> tuple[list[int], list[int]]:
        """The last ids of a prompt, and those of the answer that should follow.

        Args:
            question: end of the user's text.
            prefill: the beginning of the answer, which the model finds already written.
            answer: what it should go on with, with its leading space; empty to let it write.
        """
        if not self.chat:
            return self._cut(question + prefill, answer)
        prefill = prefill.lstrip()  # it begins a turn, not the rest of a line
        begun, wanted = self._cut(prefill, answer if prefill else answer.lstrip())
        return [*self.encode(question), *self.tail, *begun], wanted

    def _cut(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        if not answer:
            return (self.encode(prompt) if prompt else []), []
        return split_answer(self.tokenizer, prompt, answer)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids that a model wrote, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def _split_template(tokenizer: Any) -> tuple[str, str]:
    """The text that a chat template writes before and after a user's only turn."""
    if not getattr(tokenizer, "chat_template", None):
        raise CompatibilityError("template is 'chat' but this tokenizer has no chat template; use "
                                 "'base', or add chat_template.jinja to the model")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True,
        date_string=_DATE)
    if text.count(_MARK) != 1:
        raise CompatibilityError(f"the chat template writes the user's text {text.count(_MARK)} "
                                 "times instead of once; use 'base', or another template")
    before, after = text.split(_MARK)
    return before, after
