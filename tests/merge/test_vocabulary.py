"""Rows of embeddings go from token to token, against maps written out by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from extend.adapter_format.vocabulary import read_adapter_vocabulary
from extend.errors import CheckpointError, CompatibilityError
from extend.merge import merge, preview
from extend.merge.vocabulary import VocabularyMap, map_vocabulary
from extend.tokenizer import load_tokenizer, read_vocabulary
from tests.adapter_format.tiny_models import VOCAB, edit_json
from tests.merge.test_apply import weights
from tests.merge.test_deltas import added, assert_merged, deltas_of

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def mapped(source, source_rows, target, target_rows) -> VocabularyMap:
    return map_vocabulary(source, source_rows, target, target_rows, label="A", target_label="T")


def tokens(text: str) -> dict[str, int]:
    """One token a letter; a space is a row without a token."""
    return {token: row for row, token in enumerate(text) if token != " "}


# ---- maps ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("source", "target", "rows", "lacking", "added"), [
    ("abcd", "abcd", [0, 1, 2, 3], 0, 0),
    ("abcd", "abcdXY", [0, 1, 2, 3, -1, -1], 0, 2),
    ("abcd", "abc", [0, 1, 2], 1, 0),
    ("abcdef", "acef", [0, 2, 4, 5], 2, 0),           # pruned: rows move
    ("abcd", "XabcdY", [-1, 0, 1, 2, 3, -1], 0, 2),   # added in front
    ("abc   ", "abcX  ", [0, 1, 2, -1, 4, 5], 0, 1),  # padding rows by position
    ("abc ", "abc   ", [0, 1, 2, 3, -1, -1], 0, 2)])  # more padding than the base has
def test_rows_follow_their_tokens(source, target, rows, lacking, added):
    found = mapped(tokens(source), len(source), tokens(target), len(target))
    assert found.rows.tolist() == rows
    assert (found.lacking, found.added, found.renamed) == (lacking, added, ())
    assert found.is_identity == (rows == list(range(len(source))))


def test_renamed_rows_keep_their_place_and_are_told():
    found = mapped(tokens("abcdefR"), 7, tokens("abcdefCX"), 8)
    assert found.rows.tolist() == [0, 1, 2, 3, 4, 5, 6, -1]
    assert found.renamed == (("R", "C"),) and found.lacking == 0
    assert "1 rows were renamed ('R' is 'C')" in found.text()


def test_another_tokenizer_is_refused():
    letters = "abcdefghijklmnopqrstuvwxyz"
    with pytest.raises(CompatibilityError, match=r"the base of A and T have different tokenizers: "
                                                 r"26 of 26 rows .*'a' is 'z', 'b' is 'y'"):
        mapped(tokens(letters), 26, tokens(letters[::-1]), 26)
    with pytest.raises(CompatibilityError, match="different tokenizers"):
        mapped(tokens(letters), 26, tokens(letters.upper() + "12"), 28)
    with pytest.raises(CompatibilityError, match="different tokenizers: 9 of 26 rows"):
        mapped(tokens(letters), 26, tokens(letters[:17] + "ABCDEFGHI"), 26)
    assert len(mapped(tokens(letters), 26, tokens(letters[:18] + "ABCDEFGH"), 26).renamed) == 8


def test_unknown_tokens_are_taken_by_position_where_sizes_agree():
    assert mapped(None, 4, tokens("abcd"), 4).is_identity
    assert mapped(tokens("abcd"), 4, None, 4).is_identity
    with pytest.raises(CompatibilityError, match="4 in the base of A but 5 in T.*give --base"):
        mapped(None, 4, tokens("abcde"), 5)
    with pytest.raises(CompatibilityError, match="T has no list of tokens.*put the target's"):
        mapped(tokens("abcd"), 4, None, 5)


@pytest.mark.parametrize("rows", [[0, 1, 2], [-1, -1, -1], [2, 1, 0], [0, -1, 1, 2, -1, -1, 4],
                                  [3, 4, -1, 0, 1]])
def test_gathered_rows_are_those_of_the_map(rows):
    source = torch.arange(1.0, 11).reshape(5, 2)
    expected = torch.stack([source[row] if row >= 0 else torch.zeros(2) for row in rows])
    found = VocabularyMap(torch.tensor(rows), 5)
    for start in range(len(rows)):
        for stop in range(start + 1, len(rows) + 1):
            values, known = found.gather(lambda r: source[r].clone(), slice(start, stop))
            assert torch.equal(values, expected[start:stop])
            assert known.tolist() == [row >= 0 for row in rows[start:stop]]


# ---- merges --------------------------------------------------------------------------------------

def set_tokens(directory: Path, names: list[str]) -> None:
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] = {name: row for row, name in enumerate(names)}
    path.write_text(json.dumps(data))


def resized(llama, root: Path, rows: list[int], names: list[str]) -> Path:
    """The target with other embedding rows (-1: one of its own) and another tokenizer."""
    target = Path(shutil.copytree(llama.models.target, root / "resized"))
    tensors = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in EMBEDDINGS:
        own = torch.randn(len(rows), 64, generator=generator)
        own[0] = -0.0 if rows[0] < 0 else own[0]
        tensors[name] = torch.stack([tensors[name][r] if r >= 0 else own[i]
                                     for i, r in enumerate(rows)])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    edit_json(target / "config.json", vocab_size=len(rows))
    set_tokens(target, names)
    return target


LAYOUTS = {
    "added": [*range(VOCAB), -1, -1, -1, -1],
    "pruned and reordered": [-1, -1, *range(10, VOCAB), 3],
}


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("raw", [False, True], ids=["adapter", "raw"])
def test_a_target_with_other_tokens(llama, tmp_path, rows, raw):
    models = llama.models
    names = [str(row) if row >= 0 else f"<new {i}>" for i, row in enumerate(rows)]
    target = resized(llama, tmp_path, rows, names)
    if raw:
        out = merge(None, target, tmp_path / "out", tuned=models.tuned, base=models.base)
        deltas = {n: weights(models.tuned)[n].double() - t.double()
                  for n, t in weights(models.base).items()}
    else:
        out = merge(llama.adapter, target, tmp_path / "out")
        deltas = deltas_of(llama.adapter)
    for name in EMBEDDINGS:
        deltas[name] = torch.stack([deltas[name][r] if r >= 0 else torch.zeros(64).double()
                                    for r in rows])
    assert_merged(out, added(target, (1.0, deltas)))
    merged, before = weights(out), weights(target)
    untouched = torch.tensor(rows) < 0
    for name in EMBEDDINGS:
        assert torch.equal(merged[name][untouched].view(torch.int32),
                           before[name][untouched].view(torch.int32))
    [line] = json.loads((out / "manifest.json").read_text())["results"]["vocabulary"]
    assert f"{int(untouched.sum())} rows of the target stay untouched" in line
    assert f"{VOCAB - sum(r >= 0 for r in rows)} tokens of the base" in line
    assert load_tokenizer(out).get_vocab() == load_tokenizer(target).get_vocab()


@pytest.mark.parametrize("method", [("drift-aware", {}), ("orthogonal", {"rank": 2})])
def test_methods_take_added_rows_as_not_moved(llama, tmp_path, method):
    rows = LAYOUTS["added"]
    target = resized(llama, tmp_path, rows, [*map(str, range(VOCAB)), "w", "x", "y", "z"])
    options = {"method": method[0], "options": method[1], "base": llama.models.base}
    out = weights(merge(llama.adapter, target, tmp_path / "out", **options))
    same = weights(merge(llama.adapter, llama.models.target, tmp_path / "same", **options))
    for name, value in same.items():
        torch.testing.assert_close(out[name][:len(value)], value, rtol=0, atol=0)
    for name in EMBEDDINGS:
        assert torch.equal(out[name][VOCAB:], weights(target)[name][VOCAB:])


def test_renamed_tokens_are_told(llama, target, tmp_path):
    names = [str(row) if row != 7 else "<|im_start|>" for row in range(VOCAB)]
    set_tokens(target, names)
    out = merge(llama.adapter, target, tmp_path / "out")
    assert_merged(out, added(target, (1.0, deltas_of(llama.adapter))))
    [line] = json.loads((out / "manifest.json").read_text())["results"]["vocabulary"]
    assert "1 rows were renamed ('7' is '<|im_start|>')" in line
    assert "renamed" in preview(llama.adapter, target, tmp_path / "out2").text()


def test_another_tokenizer_of_the_same_size(llama, target, tmp_path):
    set_tokens(target, [str(row) for row in reversed(range(VOCAB))])
    for options in ({}, {"dry_run": True}):
        with pytest.raises(CompatibilityError, match="different tokenizers: 96 of 96 rows"):
            merge(llama.adapter, target, tmp_path / "out", **options)
    out = merge(llama.adapter, target, tmp_path / "out", sidecar=False)
    assert out.is_dir()


def test_an_adapter_without_tokens_needs_the_base(llama, adapter, tmp_path):
    (adapter / "extend_vocabulary.json").unlink()
    target = resized(llama, tmp_path, LAYOUTS["added"], [*map(str, range(VOCAB)), *"wxyz"])
    with pytest.raises(CompatibilityError, match="vocab_size is 96 .* but 100 .*give --base"):
        merge(adapter, target, tmp_path / "out")
    out = merge(adapter, target, tmp_path / "out", base=llama.models.base)
    same = merge(llama.adapter, target, tmp_path / "same")
    for name, value in weights(same).items():
        assert torch.equal(weights(out)[name], value)


def test_without_embedding_deltas_tokens_do_not_matter(llama, tmp_path):
    target = resized(llama, tmp_path, LAYOUTS["added"], [f"<{i}>" for i in range(100)])
    out = merge(llama.adapter, target, tmp_path / "out", sidecar=False)
    for name in EMBEDDINGS:
        assert torch.equal(weights(out)[name], weights(target)[name])


# ---- files ---------------------------------------------------------------------------------------

def test_vocabularies_are_those_of_transformers(llama, tmp_path):
    model = Path(shutil.copytree(llama.models.base, tmp_path / "model"))
    data = json.loads((model / "tokenizer.json").read_text())
    data["added_tokens"] = [{"id": 96, "content": "<|x|>", "special": True, "single_word": False,
                             "lstrip": False, "rstrip": False, "normalized": False}]
    (model / "tokenizer.json").write_text(json.dumps(data))
    assert read_vocabulary(model) == load_tokenizer(model).get_vocab()
    assert read_vocabulary(model)["<|x|>"] == 96
    data["model"] = {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]]}
    (model / "tokenizer.json").write_text(json.dumps(data))
    assert read_vocabulary(model) == {"a": 0, "b": 1, "<|x|>": 96}
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no vocabulary"):
        read_vocabulary(model)
    assert read_vocabulary(tmp_path) is None


def test_an_adapter_keeps_the_tokens_of_its_base(llama, adapter):
    assert read_adapter_vocabulary(adapter) == read_vocabulary(llama.models.base)
    for data in ({"schema": 2, "tokens": {}}, {"schema": 1, "tokens": {"a": "b"}}, {}):
        (adapter / "extend_vocabulary.json").write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match="not a vocabulary of schema 1"):
            read_adapter_vocabulary(adapter)
