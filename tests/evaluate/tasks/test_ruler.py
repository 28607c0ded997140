"""RULER's offline tasks against NVIDIA's samples and against solvers that read the text."""

import hashlib
import re
from collections import Counter

import pytest

from extend.errors import DataError
from extend.evaluate.frame import Frame
from extend.evaluate.score import string_match_all, string_match_part
from extend.evaluate.tasks import Cell
from extend.evaluate.tasks.ruler import RULER6, RULER13
from extend.evaluate.tasks.ruler import task as ruler_task
from extend.evaluate.tasks.ruler.tokens import PiecedText, WholeText, choose_text
from tests.evaluate.tasks.ruler_tokenizers import golden, small, smollm2
from tests.tiny_text import make_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}</s>\n{% endfor %}<assistant>\n"


def build(name, length, trials=3, seed=42, frame=None, **options):
    frame = frame or Frame.of(smollm2())
    return RULER13[name](**options).prompts(frame, Cell("x", name, length, None, trials), seed)


def text_of(prompt, tokenizer=None):
    return (tokenizer or smollm2()).decode(prompt.ids, skip_special_tokens=True)


@pytest.mark.parametrize("length", [2048, 4096])
@pytest.mark.parametrize("name", RULER6)
def test_samples_are_those_of_nvidia(name, length):
    rows = golden(name.removeprefix("ruler-"), length)
    prompts = build(name, length)
    assert len(rows) == len(prompts) == 3
    for row, prompt in zip(rows, prompts):
        text = text_of(prompt)
        assert text.endswith(row["end"] + row["answer_prefix"])
        text = text.removesuffix(row["answer_prefix"])
        assert text.startswith(row["begin"]) and len(text) == row["chars"]
        assert hashlib.sha256(text.encode()).hexdigest() == row["sha256"]
        assert prompt.details["references"] == row["outputs"]
        assert prompt.length == row["length"] <= length
        assert (prompt.answer_len, prompt.max_new_tokens) == (0, RULER13[name].new_tokens)


# A token a byte leaves no room for the example of variable tracking, which has at most 500 tokens.
@pytest.mark.parametrize("name,kind", [
    (name, kind) for name in RULER6 if name != "ruler-cwe"
    for kind in ("threes", "spaces", "lines", "bytes-bos", "merged-digits")
    if name != "ruler-vt" or kind in ("threes", "spaces", "lines")])
def test_pieces_give_what_whole_texts_give(name, kind, monkeypatch):
    tokenizer = make_tokenizer(kind) if kind in ("bytes-bos", "merged-digits") else small(kind)
    frame, used = Frame.of(tokenizer), []

    def choose(tokenizer, parts):
        used.append(choose_text(tokenizer, parts))
        return used[-1]

    length = 3000 if kind == "bytes-bos" else 2000
    monkeypatch.setattr(ruler_task, "choose_text", choose)
    pieced = build(name, length, 2, 1, frame)
    assert isinstance(used[-1], PiecedText) == (kind != "lines")
    monkeypatch.setattr(ruler_task, "choose_text", lambda tokenizer, parts: WholeText(tokenizer))
    whole = build(name, length, 2, 1, frame)
    assert [p.ids for p in pieced] == [p.ids for p in whole]
    assert all(p.length <= length for p in whole)
    assert all(list(p.ids[:len(frame.head)]) == list(frame.head) for p in whole)


def test_text_that_its_pieces_do_not_give_is_tokenised_whole(monkeypatch):
    want = build("ruler-niah_multikey_2", 2000, 1)

    class Wrong(PiecedText):
        def agrees(self, parts, ids):
            return False

    right = choose_text(smollm2(), ["One 7."])
    monkeypatch.setattr(ruler_task, "choose_text",
                        lambda tokenizer, parts: Wrong(tokenizer, right._pieces, ""))
    assert [p.ids for p in build("ruler-niah_multikey_2", 2000, 1)] == [p.ids for p in want]


def test_a_wrong_piece_is_noticed_at_both_ends():
    parts = ["The grass is green.\n", *["There and back again.\n"] * 10_000, "The end"]
    text = choose_text(smollm2(), parts[:3])
    ids = text.encode(parts)
    assert isinstance(text, PiecedText) and text.agrees(parts, ids)
    for place in (0, 100, len(ids) - 1):
        assert not text.agrees(parts, [*ids[:place], ids[place] + 1, *ids[place + 1:]])
    assert not text.agrees(parts, ids[:25_000] + ids[25_001:])
    assert ids == WholeText(smollm2()).encode(parts)


def last_text(prompt, begin):
    """The text after the last time its first words are there: without the example."""
    return begin + text_of(prompt).rsplit(begin, 1)[1]


def test_variables_are_those_that_a_reader_finds():
    for prompt in build("ruler-vt", 2048) + build("ruler-vt", 5000, 2, 7):
        text = last_text(prompt, "Memorize and track")
        value = re.search(r"assigned the value (\d+) in", text)[1]
        found = re.findall(rf"VAR (\w+) = {value}\n", text)
        links = dict(re.findall(r"VAR (\w+) = VAR (\w+) ?\n", text))
        while extra := [new for new, old in links.items() if old in found and new not in found]:
            found += extra
        assert found == prompt.details["references"] and len(set(found)) == 5


@pytest.mark.parametrize("length", [2048, 5000])
def test_common_words_are_the_most_common(length):
    for prompt in build("ruler-cwe", length, 2, 3):
        text = last_text(prompt, "Below is a numbered list").split("\nQuestion")[0]
        numbers, words = zip(*re.findall(r"(\d+)\. (\S+(?: [a-z]\S*)*)", text))
        counts = Counter(words).most_common()
        assert list(map(int, numbers)) == list(range(1, len(numbers) + 1))
        assert {w for w, _ in counts[:10]} == set(prompt.details["references"])
        assert counts[9][1] > counts[10][1]


@pytest.mark.parametrize("length", [2048, 9000])
def test_frequent_words_are_the_most_frequent(length):
    for prompt in build("ruler-fwe", length, 2, 3):
        context = text_of(prompt).split("coded words. ")[1].split("\nQuestion")[0]
        counts = Counter(context.split(" ")).most_common()
        assert counts[0][0] == "..." and counts[3][1] > counts[4][1]
        assert [word for word, _ in counts[1:4]] == prompt.details["references"]


@pytest.mark.parametrize("name", ["ruler-niah_single_1", "ruler-niah_multikey_2",
                                  "ruler-niah_multikey_3"])
def test_a_needle_is_there_once(name):
    for prompt in build(name, 4500, 2, 5):
        text = text_of(prompt)
        query = re.search(r"What is the special magic \w+ for (\S+) mentioned", text)[1]
        assert re.findall(rf"for {query} is: (\S+)\.\n", text) == prompt.details["references"]


def test_fewer_trials_are_the_first_of_more_and_seeds_differ():
    many = build("ruler-niah_multikey_3", 3000, 3, 1)
    assert build("ruler-niah_multikey_3", 3000, 1, 1) == many[:1]
    assert build("ruler-niah_multikey_3", 3000, 1, 2) != many[:1]


def test_a_chat_prompt_holds_the_text_in_its_template():
    tokenizer = make_tokenizer("bytes")
    tokenizer.chat_template = TEMPLATE
    frame = Frame.of(tokenizer, "chat")
    [prompt] = build("ruler-niah_single_1", 3000, 1, 42, frame)
    text = tokenizer.decode(prompt.ids)
    assert text.startswith("<user>\nA special magic number is hidden")
    assert re.search(r"provided text\?</s>\n<assistant>\n?The special magic number for \S+ "
                     r"mentioned in the provided text is$", text)
    assert prompt.length <= 3000


def test_grades():
    assert string_match_all("It is ABC and def", ["abc", "xyz"]) == 0.5
    assert string_match_all("", ["abc"]) == 0
    assert string_match_part("It is ABC", ["xyz", "abc"]) == 1
    assert string_match_part("It is", ["xyz", "abc"]) == 0
    [prompt] = build("ruler-vt", 2048, 1)
    task, names = RULER6["ruler-vt"](), prompt.details["references"]
    assert task.grade(" ".join(names).lower(), prompt) == 1
    assert task.grade(names[0], prompt) == 0.2


@pytest.mark.parametrize("name", RULER6)
def test_a_length_without_room_is_refused(name):
    with pytest.raises(DataError, match="x: .*greater length"):
        build(name, 160)


def test_more_words_than_there_are_need_a_file(tmp_path):
    frame = Frame.of(make_tokenizer("bytes"))
    file = tmp_path / "words.json"
    file.write_text('{"1": "red", "2": "blue"}')
    with pytest.raises(DataError, match=r"words, wonderwords has 8\d\d\d; .*`words`"):
        build("ruler-cwe", 900_000, 1, 0, frame)
    with pytest.raises(DataError, match="words.json has 2"):
        build("ruler-cwe", 900_000, 1, 0, frame, words=str(file))
    file.write_text('{"1": 5}')
    with pytest.raises(DataError, match="words.json"):
        build("ruler-cwe", 900_000, 1, 0, frame, words=str(file))
