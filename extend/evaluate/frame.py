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
_THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))  # what models think between


@dataclass(frozen=True, slots=True)
class Frame:
    """A tokenizer, and what stands before and after the user's text.

    A prompt is what `open` returns, then encoded text, then what `ask` returns; each of the first
    two ends with a line break. `ask_alone` returns a whole prompt.

    Attributes:
        chat: whether the text is a turn of a chat; otherwise the model just goes on writing.
        head: ids before the text: a BOS, or the template up to the text.
        tail: ids between the text and the answer; none for plain text.
        before, after: the template's text before and after the user's. Where an answer is known
            or has begun, thinking is over.
        thinking: tokens that a model may think before it writes an answer.
        think_after: what stands in place of `after` before such an answer.
    """

    tokenizer: Any
    chat: bool
    head: tuple[int, ...]
    tail: tuple[int, ...]
    before: str = ""
    after: str = ""
    thinking: int = 0
    think_after: str = ""

    @classmethod
    def of(cls, tokenizer: Any, template: Template = "auto", *, thinking: int = 0) -> "Frame":
        """The frame of a tokenizer: plain text for `auto` and `base`, its template for `chat`.

        Args:
            thinking: tokens that a thinking model may think before it writes an answer; 0 tells it
                not to. Answers that are known beforehand are always asked for without.

        Raises:
            RecipeError: no such template, or thinking without a chat.
            CompatibilityError: `chat` for a tokenizer without a chat template, or with one that
                leaves the user's text out.
        """
        if template not in TEMPLATES:
            raise RecipeError(f"template: unknown {template!r}; choose one of "
                              f"{', '.join(TEMPLATES)}")
        if thinking < 0 or (thinking and template != "chat"):
            raise RecipeError(f"thinking: {thinking} tokens with template {template!r}; it takes a "
                              "number of at least 0, and 'chat' where that is not 0")
        if template != "chat":
            return cls(tokenizer, False, tuple(prefix_ids(tokenizer)), ())
        before, after = _split_template(tokenizer, thinking=False)
        after, think_after = _close_thinking(tokenizer, after), ""
        if thinking:  # a system prompt may say that the model should think
            before, think_after = _split_template(tokenizer, thinking=True)
        return cls(tokenizer, True, tuple(encode(tokenizer, before)),
                   tuple(encode(tokenizer, after)), before, after, thinking, think_after)

    @property
    def prefix(self) -> tuple[int, ...]:
        """The special tokens before any plain text: a BOS, or none."""
        return tuple(prefix_ids(self.tokenizer))

    def encode(self, text: str, *, after_line: bool = False) -> list[int]:
        """Ids of `text`, without special tokens: alone, or as it reads after a line break."""
        return encode(self.tokenizer, text, after_line=after_line)

    def open(self, text: str) -> list[int]:
        """The first ids of a prompt: what stands before the user's text, and its beginning."""
        if self.chat:
            return self.encode(self.before + text)
        return [*self.head, *self.encode(text)]

    def ask(self, question: str, prefill: str, answer: str = "") -> tuple[list[int], list[int]]:
        """The last ids of a prompt, and those of the answer that should follow.

        Args:
            question: end of the user's text, after a line break.
            prefill: the beginning of the answer, which the model finds already written, unless it
                thinks first.
            answer: what it should go on with, with its leading space; empty to let it write.
        """
        return self._cut(*self._words("", question, prefill, answer), after_line=True)

    def ask_alone(self, question: str, prefill: str,
                  answer: str = "") -> tuple[list[int], list[int]]:
        """The ids of a prompt that is nothing but a question, and those of its answer."""
        begun, wanted = self._cut(*self._words(self.before, question, prefill, answer))
        return ([] if self.chat else list(self.head)) + begun, wanted

    def _words(self, before: str, question: str, prefill: str, answer: str) -> tuple[str, str]:
        if not self.chat:
            return question + prefill, answer
        if self.thinking and not answer:
            return before + question + self.think_after, ""
        prefill = prefill.lstrip()  # it begins a turn, not the rest of a line
        return before + question + self.after + prefill, answer if prefill else answer.lstrip()

    def _cut(self, prompt: str, answer: str, *,
             after_line: bool = False) -> tuple[list[int], list[int]]:
        if not answer:
            return self.encode(prompt, after_line=after_line), []
        return split_answer(self.tokenizer, prompt, answer, after_line=after_line)

    def read(self, text: str, ids: Sequence[int] = ()) -> tuple[str, bool]:
        """What a model answered, without what it thought, and whether thinking was cut off.

        Args:
            text: what it wrote, without special tokens.
            ids: the same as ids where they are known: the mark that ends thinking is a special
                token of some.
        """
        if self.thinking and ids and not any(end in text for _, end in _THINKING):
            text = self.tokenizer.decode(list(ids))
        ends = [end for _, end in _THINKING if end in text]
        if ends:
            return text[max(text.rfind(end) + len(end) for end in ends):].lstrip(), False
        opened = any(begin in self.think_after or begin in text for begin, _ in _THINKING)
        return ("", True) if self.thinking and opened else (text, False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids that a model wrote, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def _split_template(tokenizer: Any, *, thinking: bool) -> tuple[str, str]:
    """The text that a chat template writes before and after a user's only turn."""
    if not getattr(tokenizer, "chat_template", None):
        raise CompatibilityError("template is 'chat' but this tokenizer has no chat template; use "
                                 "'base', or add chat_template.jinja to the model")
    # Names that a template does not know are no error: enable_thinking is Qwen's, SmolLM's and
    # others', thinking is DeepSeek's.
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True,
            date_string=_DATE, enable_thinking=thinking, thinking=thinking)
    except Exception as error:  # templates raise what they like
        raise CompatibilityError(f"the chat template cannot be used ({error}); use 'base', or "
                                 "another template") from error
    if text.count(_MARK) != 1:
        raise CompatibilityError(f"the chat template writes the user's text {text.count(_MARK)} "
                                 "times instead of once; use 'base', or another template")
    before, after = text.split(_MARK)
    return before, after


def _close_thinking(tokenizer: Any, after: str) -> str:
    """End a block of thinking that a template leaves open, or put an empty one where it would let
    the model begin one."""
    for begin, end in _THINKING:
        opened, closed = after.rfind(begin), after.rfind(end)
        if closed > opened:
            return after
        if opened >= 0:
            return f"{after.rstrip()}\n\n{end}\n\n"
        if end in str(tokenizer.chat_template):
            return f"{after}{begin}\n\n{end}\n\n"
    return after
