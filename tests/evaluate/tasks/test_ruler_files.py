"""RULER's tasks that read the user's files, and the words that all of them draw from."""

import itertools
import json
import random
import re
import uuid

import pytest

from extend.errors import DataError, RecipeError
from extend.evaluate.frame import Frame
from extend.evaluate.plan import check_tasks, plan_tasks
from extend.evaluate.tasks import TASKS, Cell
from extend.evaluate.tasks.ruler import RULER6, RULER13
from extend.evaluate.tasks.ruler.words import (
    HyphenatedWords,
    draw_number,
    draw_uuid,
    draw_word,
    hyphenated_words,
    read_words,
)
from tests.evaluate.tasks.ruler_tokenizers import smollm2

IN_ESSAYS = {"ruler-niah_single_2": (1, 1), "ruler-niah_single_3": (1, 1),
             "ruler-niah_multikey_1": (4, 1), "ruler-niah_multivalue": (1, 4),
             "ruler-niah_multiquery": (4, 4)}


def build(name, length, trials=3, seed=42, **options):
    return RULER13[name](**options).prompts(Frame.of(smollm2()),
                                            Cell("x", name, length, None, trials), seed)


@pytest.fixture(scope="module")
def essays(tmp_path_factory):
    rng = random.Random(0)
    words = [rng.choice(["stone", "river", "lamp", "end.", "why?", "(so.)", "well", "U.S."])
             for _ in range(1500)]
    path = tmp_path_factory.mktemp("essays") / "essays.json"
    path.write_text(json.dumps({"text": " ".join(words) + "\n\n  and no more"}))
    return path


@pytest.mark.parametrize("length", [2500, 6000])
@pytest.mark.parametrize("name", IN_ESSAYS)
def test_needles_lie_between_sentences(name, length, essays):
    source = json.loads(essays.read_text())["text"].split()
    num_needles, num_answers = IN_ESSAYS[name]
    num_needles = max(num_needles, num_answers)
    for prompt in build(name, length, 3, essays=str(essays)):
        assert length - 1100 < prompt.length <= length  # samples shrink by 500 words
        text = smollm2().decode(prompt.ids)
        context, question = text.split("\n")[1:]
        needle = r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\."
        found = re.findall(needle, context)
        asked = re.split(", and |, ", re.search(r"for (.*?) mentioned", question)[1])
        assert len(found) == num_needles and len(prompt.details["references"]) == num_answers
        assert sorted(v for k, v in found if k in asked) == sorted(prompt.details["references"])
        # Without its needles the context is the essays, from their start and again.
        rest = re.sub(needle, "", context).split()
        assert rest == list(itertools.islice(itertools.cycle(source), len(rest)))
        for before in re.split("One of the special", context)[:-1]:
            assert not before.strip() or re.search(r"[.!?]\)? +$", before) or (
                before.split()[-1] == source[-1])
        single = num_answers == 1
        assert question.endswith("mentioned in the provided text " + ("is" if single else "are"))


def test_essays_may_be_plain_text(essays, tmp_path):
    file = tmp_path / "essay.txt"
    file.write_text(json.loads(essays.read_text())["text"])
    plain = build("ruler-niah_single_2", 2500, 1, essays=str(file))
    assert plain == build("ruler-niah_single_2", 2500, 1, essays=str(essays))


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    rng = random.Random(1)
    data = [{"paragraphs": [{
        "context": f"Town {a}{p} was built by Person {a}{p}. " + " ".join(
            rng.choices(["Stone", "river", "walls."], k=60)),
        "qas": [{"question": f"Who built Town {a}{p}?", "is_impossible": False,
                 "answers": [{"text": f"Person {a}{p}"}]},
                {"question": "Why?", "is_impossible": True, "answers": []}]}
        for p in range(4)]} for a in "ABCDEF"]
    path = tmp_path_factory.mktemp("squad") / "dev-v2.0.json"
    path.write_text(json.dumps({"data": data}))
    return path


@pytest.fixture(scope="module")
def hotpot(tmp_path_factory):
    rows = [{"question": f"Who wrote book {i}?", "answer": f"writer {i}", "context": [
        [f"Title {i}-{k}", [f"Book {i} is old.", f" It is by writer {i}." if k == 3 else " Yes."]]
        for k in range(10)]} for i in range(8)]
    path = tmp_path_factory.mktemp("hotpot") / "hotpot.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("length", [1600, 5000])
def test_an_answer_is_in_the_documents(length, squad, hotpot):
    for name, file in (("ruler-qa_1", squad), ("ruler-qa_2", hotpot)):
        prompts = build(name, length, 4, file=str(file))
        for number, prompt in enumerate(prompts):
            text = smollm2().decode(prompt.ids)
            documents = re.findall(r"Document (\d+):\n(.*?)\n\n", text, re.DOTALL)
            assert [int(n) for n, _ in documents] == list(range(1, len(documents) + 1))
            question, = re.findall(r"other words.\n\nQuestion: (.*) Answer:$", text)
            [answer] = prompt.details["references"]
            own = [doc for _, doc in documents if answer.split()[-1] in doc and answer in doc]
            assert own and number < 4 and question.split()[-1].rstrip("?") in own[0]
            assert prompt.length <= length and prompt.max_new_tokens == 32
        assert RULER13[name](file=str(file)).grade(f"It is {answer.upper()}.", prompts[-1]) == 1
        assert RULER13[name](file=str(file)).grade("It is nobody.", prompts[-1]) == 0


def test_documents_of_the_question_come_first(squad):
    """With room for few documents they are those of the same article."""
    [prompt] = build("ruler-qa_1", 1100, 1, file=str(squad))
    towns = re.findall(r"Town ([A-F])", smollm2().decode(prompt.ids))
    assert towns.count("A") - 1 == 4 and len(towns) > 6


def test_files_that_do_not_fit_are_refused(tmp_path, squad, hotpot):
    with pytest.raises(DataError, match="24 questions; ask for as many trials"):
        build("ruler-qa_1", 1600, 25, file=str(squad))
    with pytest.raises(DataError, match="not in the form that ruler-qa_2 reads"):
        build("ruler-qa_2", 1600, 1, file=str(squad))
    with pytest.raises(DataError, match="question 0 of .* greater length"):
        build("ruler-qa_2", 300, 1, file=str(hotpot))
    with pytest.raises(DataError, match=r"missing.json: cannot be read"):
        build("ruler-qa_1", 1600, 1, file=str(tmp_path / "missing.json"))
    file = tmp_path / "essays.json"
    file.write_text('["a"]')
    with pytest.raises(DataError, match="under 'text'"):
        build("ruler-niah_single_2", 2500, 1, essays=str(file))
    file.write_text('{"text": " "}')
    with pytest.raises(DataError, match="no text"):
        build("ruler-niah_single_2", 2500, 1, essays=str(file))


def test_a_missing_file_names_the_option():
    for name in RULER13:
        assert TASKS[name] is RULER13[name]
        if name in RULER6:
            check_tasks([name])
            continue
        option = "file" if "qa" in name else "essays"
        with pytest.raises(RecipeError, match=f"{name}: missing option {option}"):
            check_tasks([name])
        check_tasks([{"task": name, option: "a.json"}])
    [planned] = plan_tasks(["ruler-vt"], lengths=[2048, 1024], depths=10, trials=2)
    assert [(cell.length, cell.depth, cell.trials) for cell in planned.cells] == [
        (1024, None, 2), (2048, None, 2)]


def test_hyphenated_words_are_the_sorted_different_ones():
    firsts = ["well", "odd", "well-made", "a", "odd", "well-a", "ode"]
    seconds = ["up", "made-up", "b", "up", "a-b", "zoo"]
    words = HyphenatedWords(firsts, seconds)
    want = sorted({f"{first}-{second}" for first in firsts for second in seconds})
    assert [words[i] for i in range(len(words))] == want and len(words) == len(want)
    with pytest.raises(IndexError):
        words[len(words)]


def test_all_needle_names_are_sorted():
    words = hyphenated_words()
    assert len(words) <= len(set(read_words("adjectives"))) * len(set(read_words("nouns")))
    rng = random.Random(0)
    for index in (0, len(words) - 2, *(rng.randrange(len(words) - 1) for _ in range(5000))):
        assert words[index] < words[index + 1]


def test_draws_are_those_of_the_standard_library():
    words = hyphenated_words()
    for seed in range(3):
        ours, theirs = random.Random(seed), random.Random(seed)
        for _ in range(2000):
            assert draw_number(ours) == str(theirs.randint(10**6, 10**7 - 1))
            assert draw_word(ours) == theirs.choice(words)
            assert draw_uuid(ours) == str(uuid.UUID(int=theirs.getrandbits(128), version=4))
        assert ours.getstate() == theirs.getstate()
