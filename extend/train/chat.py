"""Conversations as a chat template writes them, and which tokens of them the assistant wrote.

A template that marks what the assistant writes (`{% generation %}`) is believed. With any other,
every answer is found in the text of the whole conversation: it begins where the conversation up to
it ends with the template's generation prompt, and ends where the conversation with it does.
"""

import re
from collections.abc import Callable
from typing import Any

from extend.errors import DataError

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "\u27e6answer\u27e7"  # in place of an answer, to see what the template puts around it

Render = Callable[..., str]
Span = tuple[int, int]


def encode_chat(tokenizer: Any, messages: Any, tools: Any,
                where: str) -> tuple[list[int], list[bool]]:
    """Ids [n] of a conversation, and which of them the assistant wrote, bool [n].

    An answer takes in the special token that ends its turn, and no white space after that.

    Args:
        messages: mappings with `role` and `content`, as transformers takes them.
        tools: that the template describes to the model, or None.
        where: file and line, for messages.

    Raises:
        DataError: no chat template or fast tokenizer, messages that the template refuses, no
            answer, or one that cannot be told from the rest.
    """
    _check(tokenizer, messages, where)
    try:
        if _MARKS.search(_template(tokenizer, tools)):
            coded = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True,
                                                  return_dict=True,
                                                  return_assistant_tokens_mask=True)
            ids, answers = coded["input_ids"], [bool(one) for one in coded["assistant_masks"]]
        else:
            text, spans = _find_answers(tokenizer, messages, tools, where)
            coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, answers = coded["input_ids"], _mark(coded["offset_mapping"], spans)
    except DataError:
        raise
    except Exception as error:  # templates raise what they like
        raise DataError(f"{where}: the chat template refuses the messages ({error})") from None
    if not any(answers):
        raise DataError(f"{where}: the messages hold no answer; one needs the role 'assistant' "
                        "and some content")
    return list(ids), answers


def _check(tokenizer: Any, messages: Any, where: str) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{where}: messages need a fast tokenizer (tokenizer.json)")
    if not tokenizer.chat_template:
        raise DataError(f"{where}: has messages, but the tokenizer has no chat template; give it "
                        "one (chat_template.jinja), or write 'prompt' and 'answer'")
    if (not isinstance(messages, list) or not messages
            or not all(isinstance(one, dict) and isinstance(one.get("role"), str)
                       for one in messages)):
        raise DataError(f"{where}: 'messages' is no list of mappings with 'role' and 'content'")


def _template(tokenizer: Any, tools: Any) -> str:
    """The template that the tokenizer takes: some have several, by name."""
    return str(tokenizer.get_chat_template(tools=tools))


def _find_answers(tokenizer: Any, messages: list[dict], tools: Any,
                  where: str) -> tuple[str, list[Span]]:
    """The whole conversation, and where its answers lie, in characters."""
    def render(some: list[dict], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(some, tools=tools, tokenize=False,
                                             add_generation_prompt=prompt)

    text = render(messages)
    ends = re.compile("|".join(sorted(
        (re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()
         if token.special), key=len, reverse=True)) or r"(?!)")
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        span = _find_turn(render, text, messages, turn, ends)
        if span is None:
            raise DataError(
                f"{where}: cannot tell message {turn + 1}, an answer, from the rest of the "
                "conversation: the chat template writes it otherwise when more follows; give the "
                "tokenizer a template that marks answers with {% generation %}")
        spans.append((span[0], _without_space(text, span, ends)))
    return text, spans


def _find_turn(render: Render, text: str, messages: list[dict], turn: int,
               ends: re.Pattern) -> Span | None:
    """Where the answer of one turn lies, with the end of its turn."""
    begin = len(render(messages[:turn], True)) if turn else None
    if begin is not None and not text.startswith(render(messages[:turn], True)):
        begin = None
    after = render(messages[:turn + 1])
    end = len(after) if text.startswith(after) else None
    if begin is None or end is None:
        content = _find_content(render, text, messages, turn, ends)
        if content is None:
            return None
        begin = content[0] if begin is None else begin
        end = content[1] if end is None else end
    return begin, end


def _find_content(render: Render, text: str, messages: list[dict], turn: int,
                  ends: re.Pattern) -> Span | None:
    """Where the content of an answer lies, with the special token after it, by what surrounds it.

    This finds answers that templates write otherwise in the end than amid a conversation.
    """
    if not messages[turn].get("content") or messages[turn].get("tool_calls"):
        return None
    other = [*messages[:turn], {**messages[turn], "content": _STAND_IN}, *messages[turn + 1:]]
    before, found, after = render(other).partition(_STAND_IN)
    size = len(before) + len(after)
    if not found or len(text) <= size or not (text.startswith(before) and text.endswith(after)):
        return None
    close = ends.match(after)
    return len(before), len(text) - len(after) + (close.end() if close else 0)


def _without_space(text: str, span: Span, ends: re.Pattern) -> int:
    """End of a turn's last special token, if nothing but white space follows it there."""
    last = max((match.end() for match in ends.finditer(text, *span)), default=span[1])
    return span[1] if text[last:span[1]].strip() else last


def _mark(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Which tokens lie in one of the spans, even if only in part, as transformers counts them."""
    marked, spans = [], list(spans)
    for begin, end in offsets:
        while spans and begin >= spans[0][1]:
            spans.pop(0)
        marked.append(bool(spans) and end > spans[0][0])
    return marked
