"""Frames against the templates' own rendering."""

import pytest

from extend.errors import CompatibilityError, RecipeError
from extend.evaluate.frame import Frame
from tests.real_tokenizers import MADE, REAL, load
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


@pytest.mark.parametrize("name", [*REAL, *MADE])
def test_a_chat_prompt_is_the_tokenised_rendering(name):
    """Ids in pieces are those of the whole text as the template and the tokenizer make them."""
    tokenizer = load(name)
    frame = Frame.of(tokenizer, "chat")
    asked, wanted = frame.ask("Which number is it?", " The number is", " 48213")
    text = "Read this.\nThere is some text.\nWhich number is it?"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    whole = tokenizer(rendered + "The number is 48213", add_special_tokens=False)["input_ids"]
    assert [*frame.open("Read this.\n"), *frame.encode("There is some text.\n", after_line=True),
            *asked, *wanted] == whole
    assert "".join(tokenizer.decode(wanted).split()) == "48213"
    alone, answer = frame.ask_alone(text, " The number is", " 48213")
    assert alone + answer == whole and answer == wanted
    begin = tokenizer.bos_token_id
    assert whole.count(begin) <= 1 or name in ("smollm2", "anthropic")  # a BOS is never doubled


@pytest.mark.parametrize("name", [*REAL, *MADE])
def test_a_plain_prompt_is_the_tokenised_text(name):
    tokenizer = load(name)
    frame = Frame.of(tokenizer)
    asked, wanted = frame.ask("Which number is it?", " The number is", " 48213")
    parts = ["Read this.\n", "There is some text.\n"]
    whole = tokenizer("".join(parts) + "Which number is it? The number is 48213")["input_ids"]
    made = [*frame.open(parts[0]), *frame.encode(parts[1], after_line=True), *asked, *wanted]
    assert made == whole
    alone, answer = frame.ask_alone("".join(parts) + "Which number is it?", " The number is",
                                    " 48213")
    assert alone + answer == made


THINKING = {
    # Knows a switch and writes an empty block itself.
    "switch": ("<user>{{ messages[0].content }}<bot>{% if enable_thinking is defined and not "
               "enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
               "<think>\n\n</think>\n\n", ""),
    # Always opens a block.
    "open": ("<user>{{ messages[0].content }}<bot>{{ '<think>\n' }}", "<think>\n\n</think>\n\n",
             "<think>\n"),
    # Leaves it to the model to open one.
    "free": ("{% set kept = messages[0].content.split('</think>')[-1] %}<user>{{ kept }}<bot>",
             "<think>\n\n</think>\n\n", ""),
    # Closes it with the closing mark alone.
    "closing": ("<user>{{ messages[0].content }}<bot>{% if thinking %}<think>{% else %}</think>"
                "{% endif %}", "</think>", "<think>"),
    "none": ("<user>{{ messages[0].content }}<bot>", "", ""),
    "brackets": ("<user>{{ messages[0].content }}<bot>[THINK]", "[THINK]\n\n[/THINK]\n\n",
                 "[THINK]")}


@pytest.mark.parametrize("name", THINKING)
def test_thinking_is_over_where_an_answer_is_known_or_has_begun(name):
    template, closed, opened = THINKING[name]
    tokenizer = chatty("bytes", template)
    still, thinks = Frame.of(tokenizer, "chat"), Frame.of(tokenizer, "chat", thinking=50)
    for frame in (still, thinks):
        asked, wanted = frame.ask("Which?", " It is", " 42")
        assert tokenizer.decode(asked + wanted) == f"Which?<bot>{closed}It is 42"
    assert tokenizer.decode(still.ask("Which?", " It is")[0]) == f"Which?<bot>{closed}It is"
    assert tokenizer.decode(thinks.ask("Which?", " It is")[0]) == f"Which?<bot>{opened}"


def test_what_was_thought_is_not_read():
    still = Frame.of(chatty("bytes", THINKING["open"][0]), "chat")
    thinks = Frame.of(chatty("bytes", THINKING["open"][0]), "chat", thinking=50)
    free = Frame.of(chatty("bytes", THINKING["free"][0]), "chat", thinking=50)
    assert thinks.read("It may be 41.\n</think>\n\nIt is 42.") == ("It is 42.", False)
    assert thinks.read("It may be 41 or 42") == ("", True)
    assert free.read("<think>It may be 42") == ("", True)
    assert free.read("It is 42.") == ("It is 42.", False)
    assert still.read("It is 42.") == ("It is 42.", False)
    assert Frame.of(make_tokenizer("bytes")).read(" 42") == (" 42", False)
    tokenizer = chatty("bytes", THINKING["brackets"][0])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    ids = tokenizer("Or 41?[/THINK] 42", add_special_tokens=False)["input_ids"]
    brackets = Frame.of(tokenizer, "chat", thinking=50)
    assert brackets.decode(ids) == "Or 41? 42"
    assert brackets.read(brackets.decode(ids), ids) == ("42", False)
    assert brackets.read(brackets.decode(ids[:4]), ids[:4]) == ("", True)
    with pytest.raises(RecipeError, match="50 tokens with template 'base'"):
        Frame.of(make_tokenizer("bytes"), "base", thinking=50)


def test_what_cannot_be_framed_is_refused():
    with pytest.raises(CompatibilityError, match="no chat template"):
        Frame.of(make_tokenizer("bytes"), "chat")
    with pytest.raises(CompatibilityError, match="0 times"):
        Frame.of(chatty("bytes", "hello"), "chat")
    with pytest.raises(CompatibilityError, match="2 times"):
        Frame.of(chatty("bytes", "{{ messages[0].content }} {{ messages[0].content }}"), "chat")
    with pytest.raises(RecipeError, match="chatml"):
        Frame.of(make_tokenizer("bytes"), "chatml")
