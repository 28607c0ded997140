"""Frames against the templates' own rendering."""

import pytest

from extend.errors import CompatibilityError, RecipeError
from extend.evaluate.frame import Frame
from tests.tiny_text import KINDS, make_tokenizer

TEMPLATE = ("{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}</s>\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>\n{% endif %}")


def chatty(kind, template=TEMPLATE):
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_prompt_is_what_the_template_writes(kind):
    tokenizer = chatty(kind)
    frame = Frame.of(tokenizer, "chat")
    asked, wanted = frame.ask("Which number?", " It is", " 42")
    ids = [*frame.head, *frame.encode("Some text.\n"), *asked]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Some text.\nWhich number?"}], tokenize=False,
        add_generation_prompt=True)
    assert tokenizer.decode(ids + wanted) == rendered + "It is 42"
    assert tokenizer.decode(wanted).strip() == "42"


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_prompt_begins_with_the_special_tokens_of_any_text(kind):
    tokenizer = make_tokenizer(kind)
    frame = Frame.of(tokenizer)
    assert not frame.chat and frame.tail == () and frame.head == frame.prefix
    asked, wanted = frame.ask("Which number?", " It is", " 42")
    assert tokenizer.decode(asked + wanted) == "Which number? It is 42"
    assert list(frame.head) + frame.encode("Which number?") == tokenizer("Which number?")[
        "input_ids"][:len(frame.head) + len(frame.encode("Which number?"))]


def test_an_answer_without_a_prefill_begins_the_turn():
    frame = Frame.of(chatty("bytes"), "chat")
    asked, wanted = frame.ask("Which?", "", " 42")
    assert frame.decode(wanted) == "42" and frame.decode(asked).endswith("<assistant>\n")
    assert frame.ask("Which?", "") == (asked, [])


def test_what_cannot_be_framed_is_refused():
    with pytest.raises(CompatibilityError, match="no chat template"):
        Frame.of(make_tokenizer("bytes"), "chat")
    with pytest.raises(CompatibilityError, match="0 times"):
        Frame.of(chatty("bytes", "hello"), "chat")
    with pytest.raises(CompatibilityError, match="2 times"):
        Frame.of(chatty("bytes", "{{ messages[0].content }} {{ messages[0].content }}"), "chat")
    with pytest.raises(RecipeError, match="chatml"):
        Frame.of(make_tokenizer("bytes"), "chatml")
