import pytest

from extend.errors import DataError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks import TASKS
from tests.tiny_text import KINDS, make_text, make_tokenizer


def windows_of(task, tokenizer):
    cell, = task.cells("held-out", (), (), 0)
    return task.prompts(Frame.of(tokenizer), cell, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_tile_the_joined_documents(kind, tmp_path):
    tokenizer = make_tokenizer(kind)
    texts = [make_text(20, seed) for seed in (1, 2, 3)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    prompts = windows_of(TASKS["loss"](text=str(tmp_path), window=64, max_tokens=10**6), tokenizer)
    assert {(len(p.ids), p.answer_len) for p in prompts} == {(64, 63)}
    bos = [tokenizer.bos_token_id] if kind == "bytes-bos" else []
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    joined = [i for p in prompts for i in p.ids[len(bos):]]
    assert all(p.ids[:len(bos)] == bos for p in prompts)
    assert joined == ids[:len(joined)] and len(ids) - len(joined) < 64


def test_windows_are_spread_when_there_is_more_text(tmp_path):
    tokenizer = make_tokenizer("bytes")
    (tmp_path / "x.txt").write_text("".join(f"{n:07d}\n" for n in range(100)))
    prompts = windows_of(TASKS["loss"](text=str(tmp_path), window=8, max_tokens=32), tokenizer)
    assert [tokenizer.decode(p.ids) for p in prompts] == [
        f"{n:07d}\n" for n in (0, 25, 50, 75)]


@pytest.mark.parametrize(("options", "message"), [
    ({"window": 512}, "has 80 tokens, too few for one window of 512"),
    ({"window": 64, "max_tokens": 63}, "must hold at least 2 of text and fit into max_tokens"),
    ({"window": 1}, "must hold at least 2"),
])
def test_what_does_not_fit_is_refused(tmp_path, options, message):
    (tmp_path / "x.txt").write_text("1234567\n" * 10)
    with pytest.raises(DataError, match=message):
        windows_of(TASKS["loss"](text=str(tmp_path), **options), make_tokenizer("bytes"))
