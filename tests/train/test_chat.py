"""Conversations: the ids of the chat template, and the loss on what the assistant says."""

import json
from pathlib import Path

import numpy as np
import pytest

from extend.errors import DataError
from extend.train.chat import encode_chat
from extend.train.data import IGNORE, load_rows
from extend.train_options import TrainOptions
from tests.real_tokenizers import load
from tests.train.tiny import EOS, save_tokenizer

TURNS = [{"role": "system", "content": "Be short."},
         {"role": "user", "content": "What is 2 + 2?"},
         {"role": "assistant", "content": "It is 4."},
         {"role": "user", "content": "Sure?"},
         {"role": "assistant", "content": "Yes.\nQuite."}]
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MARKED_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# Thoughts are written in the last answer only, as Qwen3 does.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA2 = ("{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}</s>"
          "{% elif m.role == 'user' %}<s>[INST] {{ m.content | trim }} [/INST]{% endif %}"
          "{% endfor %}")
MARKED_LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %} {{ m.content | trim }}"
    "</s>{% endgeneration %}{% elif m.role == 'user' %}<s>[INST] {{ m.content | trim }} [/INST]"
    "{% endif %}{% endfor %}")
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.",
                                           "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def tokenizer_of(monkeypatch: pytest.MonkeyPatch):
    def give(name: str, template: str | None):
        tokenizer = load(name)
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return give


def said(tokenizer, ids: list[int], answers: list[bool]) -> str:
    return tokenizer.decode(np.asarray(ids)[np.asarray(answers)])


@pytest.mark.parametrize(("name", "plain", "marked"), [
    ("smollm2", CHATML, MARKED_CHATML), ("mistral", LLAMA2, MARKED_LLAMA2)])
@pytest.mark.parametrize("turns", [TURNS, TURNS[1:3], TURNS[1:4]])
def test_answers_are_those_that_transformers_mark(name: str, plain: str, marked: str, turns: list,
                                                  tokenizer_of):
    tokenizer = tokenizer_of(name, marked)
    want = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True,
                                         return_assistant_tokens_mask=True)
    assert 0 < sum(want["assistant_masks"]) < len(want["input_ids"])
    for template in (marked, plain):
        ids, answers = encode_chat(tokenizer_of(name, template), turns, None, "here")
        assert ids == want["input_ids"]
        assert answers == [bool(one) for one in want["assistant_masks"]]


def test_the_end_of_a_turn_is_learnt_and_no_line_break_after_it(tokenizer_of):
    tokenizer = tokenizer_of("smollm2", CHATML)
    ids, answers = encode_chat(tokenizer, TURNS, None, "here")
    assert said(tokenizer, ids, answers) == "It is 4.<|im_end|>Yes.\nQuite.<|im_end|>"


def test_templates_that_write_the_last_answer_otherwise(tokenizer_of):
    tokenizer = tokenizer_of("smollm2", THINKING)
    ids, answers = encode_chat(tokenizer, TURNS, None, "here")
    assert ids == tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    assert said(tokenizer, ids, answers) == (
        "It is 4.<|im_end|><think>\n\n</think>\n\nYes.\nQuite.<|im_end|>")


def test_tools_are_told_to_the_model(tokenizer_of):
    tokenizer = tokenizer_of("smollm2", "{{ tools[0].function.name }}\n" + CHATML)
    ids, answers = encode_chat(tokenizer, TURNS, TOOLS, "here")
    assert tokenizer.decode(ids).startswith("add\n<|im_start|>system")
    assert said(tokenizer, ids, answers).startswith("It is 4.")


def call(role: str = "assistant", **more: object) -> dict:
    return {"role": role, "content": "", **more}


@pytest.mark.parametrize(("template", "messages", "match"), [
    (None, TURNS, "has messages, but the tokenizer has no chat template"),
    (CHATML, "hello", "'messages' is no list of mappings"),
    (CHATML, [], "'messages' is no list of mappings"),
    (CHATML, ["hello"], "'messages' is no list of mappings"),
    (CHATML, TURNS[:2], "the messages hold no answer"),
    (MARKED_CHATML, TURNS[:2], "the messages hold no answer"),
    ("{{ raise_exception('roles must alternate') }}", TURNS,
     r"the chat template refuses the messages \(roles must alternate"),
    # The answer is written otherwise in the end, and its content cannot be found.
    (THINKING, [TURNS[1], call(), TURNS[3], TURNS[4]], "cannot tell message 2, an answer"),
    (CHATML.replace("m.content", "m.content[::-1]"), [TURNS[2], TURNS[1]],
     "cannot tell message 1, an answer"),
])
def test_bad_conversations_are_named(template: str | None, messages: object, match: str,
                                     tokenizer_of):
    with pytest.raises(DataError, match=f"^here: {match}"):
        encode_chat(tokenizer_of("smollm2", template), messages, None, "here")


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_rows_of_conversations_beside_pairs(mask_prompt: bool, tmp_path: Path):
    """The template alone says what a conversation begins and ends with."""
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.chat_template = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}" + EOS
                               + "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")
    lines = [{"messages": TURNS[1:]}, {"prompt": "One and", "answer": " two."}] * 8
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = TrainOptions(model="m", schedule=[{"length": 256, "steps": 4, "lr": 1}], data=[
        {"kind": "examples", "path": str(path), "mask_prompt": mask_prompt}])
    row = load_rows(run, tokenizer).row(0, 1)
    chat = f"[user]What is 2 + 2?{EOS}[assistant]It is 4.{EOS}[user]Sure?{EOS}[assistant]Yes.\n" \
           f"Quite.{EOS}"
    wanted = {chat: f"It is 4.{EOS}Yes.\nQuite.{EOS}", f"One and two.{EOS}": f" two.{EOS}"}
    seen = set()
    for begin, end in zip(row.cu_seqlens[:-2], row.cu_seqlens[1:-1], strict=True):
        part = slice(begin, end)
        whole = tokenizer.decode(row.input_ids[part])
        assert tokenizer.decode(row.input_ids[part][row.answers[part]]) == wanted[whole]
        predicted = row.labels[part] != IGNORE
        np.testing.assert_array_equal(predicted[1:], row.answers[part][1:] if mask_prompt
                                      else np.ones(end - begin - 1, dtype=bool))
        seen.add(whole)
    assert seen == set(wanted)
