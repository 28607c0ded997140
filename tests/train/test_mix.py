"""What rows are made of: a mix for each phase, long documents more often, long ones cut."""

import copy
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing

from extend.errors import DataError
from extend.train.data import IGNORE, Rows, load_rows
from extend.train.stream import ExampleStream, PackedStream
from extend.train.token_cache import Documents
from extend.train_options import TrainOptions
from tests.train.tiny import save_examples, save_text, save_tokenizer

EOS = 0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("data")
    return {"text": str(save_text(directory)), "examples": str(save_examples(directory))}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def with_bos(tokenizer, token: str | None):
    """The same tokenizer, with a token before each text."""
    if token is None:
        return tokenizer
    other, bos = copy.deepcopy(tokenizer), tokenizer.convert_tokens_to_ids(token)
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, bos)])
    return other


def sources(files: dict[str, str]) -> list[dict]:
    return [{"kind": "text", "path": files["text"], "name": "books", "weight": 3},
            {"kind": "retrieval"},
            {"kind": "examples", "path": files["examples"], "name": "skill"}]


def choose(files: dict[str, str], *mixes: dict | None, **changes: object) -> TrainOptions:
    phases = [{"length": 128, "steps": 60, "lr": 1e-4, "mix": mix} for mix in mixes]
    return TrainOptions(**({"model": "m", "data": sources(files), "schedule": phases} | changes))


def documents(lengths: list[int], answers: bool = False) -> Documents:
    """Documents whose tokens are all different, from 1 on; every second one is an answer."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    return Documents("made", ids, np.concatenate(([0], np.cumsum(lengths))),
                     ids % 2 == 0 if answers else None, 0)


def test_each_phase_has_its_own_mix(files, tokenizer):
    run = choose(files, None, {"books": 1, "1": 2}, {2: 1})
    rows = load_rows(run, tokenizer)
    counts = [Counter(rows.row(phase, index).source for index in range(60)) for phase in range(3)]
    names = [files["text"], "retrieval in repeated filler", files["examples"]]
    want = [[36, 12, 12], [20, 40, 0], [0, 0, 60]]
    for count, shares in zip(counts, want, strict=True):
        for name, share in zip(names, shares, strict=True):
            assert abs(count[name] - share) <= 2 * (share not in (0, 60)), (name, count)


def test_a_source_is_checked_for_the_lengths_that_it_gives_rows_of(files, tokenizer):
    phases = [{"length": 128, "steps": 1, "lr": 1e-4},
              {"length": 65536, "steps": 1, "lr": 1e-4, "mix": {1: 1}}]
    rows = load_rows(choose(files, schedule=phases), tokenizer)  # there is no such long text
    assert len(rows.row(1, 0).input_ids) == 65536
    with pytest.raises(DataError, match="too few for a row of 65536"):
        load_rows(choose(files, schedule=[phases[0], phases[1] | {"mix": {"books": 1}}]), tokenizer)


@pytest.mark.parametrize(("mix", "match"), [
    ({"book": 1}, "mix of phase 2: no source is called 'book'; there are 'books' (0), 1, "
                  "'skill' (2)"),
    ({3: 1}, "mix of phase 2: no source is called 3"),
    ({"books": 0, 1: 0}, "mix of phase 2: no source has a weight above 0"),
    ({}, "mix of phase 2: no source has a weight above 0"),
    ({"books": 1, 0: 1}, "mix of phase 2: 'books' and 0 are the same source"),
    ({"books": -1}, "greater than or equal to 0"),
])
def test_a_bad_mix_is_refused(mix: dict, match: str, files):
    with pytest.raises(ValidationError, match=re.escape(match)):
        choose(files, None, mix)


@pytest.mark.parametrize(("change", "match"), [
    ({"name": "skill"}, "2 sources are named 'skill'"),
    ({"name": "12"}, "'12' is no name of a source"),
    ({"document_length": 64, "document_mask": False}, "data[0]: document_length needs documents"),
    ({"document_length": 64, "join": True}, "data[0]: document_length needs documents that do not "
     "see one another, but join is true"),
    ({"rope": "native", "join": True}, "data[0]: rope: native needs documents"),
    ({"distill": True, "join": True, "rope": "native"}, "data[0]: rope: native needs documents"),
    ({"distill": True, "join": True, "document_mask": False}, "data[0]: distill needs documents "
     "that do not see one another, but document_mask is false"),
    ({"distill": True, "document_mask": False}, "data[0]: distill needs documents"),
    ({"rope": "native", "document_mask": False}, "data[0]: rope: native needs documents"),
    ({"upsample": {"min_length": 10, "factor": 0.5}}, "greater than or equal to 1"),
])
def test_a_bad_source_is_refused(change: dict, match: str, files):
    mask = {"document_mask": change.pop("document_mask", True)}
    data = sources(files)
    with pytest.raises(ValidationError, match=re.escape(match)):
        choose(files, None, data=[data[0] | change, *data[1:]], **mask)


@pytest.mark.parametrize("factor", [1, 3, 1.5, 2.75])
def test_long_documents_appear_factor_times_as_often(factor: float):
    lengths = [5, 40, 7, 50, 9, 60, 40, 11, 39]
    options = TrainOptions(model="m", data=[{
        "kind": "text", "path": "p", "upsample": {"min_length": 40, "factor": factor}}],
        schedule=[{"length": 8, "steps": 1, "lr": 1}])
    stream = PackedStream(documents(lengths), prefix=[], eos=EOS, seed=3,
                          upsample=options.data[0].upsample)
    counts, long = np.zeros(len(lengths), dtype=int), np.array([n >= 40 for n in lengths])
    for passed in range(1, 9):
        order, ends = stream._passes.order(0, passed - 1)
        counts += np.bincount(order, minlength=len(lengths))
        assert (counts[~long] == passed).all()
        floor = int(np.floor(passed * factor))
        assert set(counts[long]) <= {floor, int(np.ceil(passed * factor))}
        assert ends[-1] == stream.sizes[order].sum()
    # Eight times any of these factors is a whole number.
    assert (counts[long] == 8 * factor).all()
    # Rows laid end to end are those passes, whatever row is asked for first.
    total = int(counts @ stream.sizes)
    cut = {index: stream.cut(0, index, 64) for index in reversed(range(total // 64))}
    laid = np.concatenate([cut[index].ids for index in range(total // 64)])
    starts = np.searchsorted(stream.documents.offsets + 1, laid[laid != EOS], side="right") - 1
    tokens = np.bincount(starts, minlength=len(lengths))
    assert (np.array(lengths) * counts - tokens >= 0).all()
    assert (np.array(lengths) * counts - tokens).sum() < 64


def test_upsampling_that_finds_nothing_is_refused(files, tokenizer):
    data = [sources(files)[0] | {"upsample": {"min_length": "4k", "factor": 2}}]
    with pytest.raises(DataError, match="at least 4096 tokens, but the longest has"):
        load_rows(choose(files, None, data=data), tokenizer)


@pytest.mark.parametrize("prefix", [[], [7000]])
@pytest.mark.parametrize("piece", [None, 1, 10, 16])
def test_long_documents_are_cut_into_pieces(piece: int | None, prefix: list[int]):
    """Every token of every pass once; pieces count from each document's own beginning."""
    lengths = [3, 50, 16, 15, 9, 33]
    stream = PackedStream(documents(lengths), prefix=prefix, eos=EOS, seed=0, document_length=piece)
    whole = stream.cut(0, 0, int(stream.sizes.sum()))
    body = whole.ids[(whole.ids != EOS) & (whole.ids != 7000)]
    assert sorted(body) == list(range(1, sum(lengths) + 1))
    limit = piece or max(lengths) + 2
    order = stream._passes.order(0, 0)[0]
    want = [size for document in order for full in [lengths[document] + len(prefix) + 1]
            for size in [limit] * (full // limit) + [full % limit] * (full % limit > 0)]
    assert np.diff(whole.bounds).tolist() == want
    starts = np.concatenate(([0], np.cumsum(stream.sizes[order])[:-1]))
    # What begins a document is not predicted; what begins another piece is.
    np.testing.assert_array_equal(np.flatnonzero(~whole.labels), starts)
    assert stream.longest == min(limit, max(lengths) + 1 + len(prefix))
    for length in (7, 20):  # rows are stretches of the same
        for index in range(len(whole.ids) // length):
            row, begin = stream.cut(0, index, length), index * length
            np.testing.assert_array_equal(row.ids, whole.ids[begin:begin + length])
            np.testing.assert_array_equal(row.labels, whole.labels[begin:begin + length])
            inside = whole.bounds[(whole.bounds > begin) & (whole.bounds < begin + length)] - begin
            np.testing.assert_array_equal(row.bounds, [0, *inside, length])


def test_examples_are_whole_and_each_pass_has_all(files):
    lengths = [3, 20, 6, 15, 9, 12]
    made = documents(lengths, answers=True)
    stream = ExampleStream(made, eos=EOS, seed=0)
    rows = {index: stream.cut(0, index, 32) for index in (9, 3, 0, 1, 2, 4, 5, 6, 7, 8)}
    seen = []
    for index in range(10):
        row = rows[index]
        for begin, end in zip(row.bounds[:-1], row.bounds[1:], strict=True):
            if row.ids[begin] == EOS:  # what is left
                assert end == 32 and not row.ids[begin:].any() and not row.labels[begin:].any()
                continue
            number = int(np.searchsorted(made.offsets, row.ids[begin] - 1))
            low, high = made.offsets[number:number + 2]
            np.testing.assert_array_equal(row.ids[begin:end], made.ids[low:high])
            np.testing.assert_array_equal(row.answers[begin + 1:end], made.answers[low + 1:high])
            assert not row.labels[begin] and row.labels[begin + 1:end].all()
            seen.append((index, number))
    numbers = [number for _, number in seen]
    for begin in range(0, len(numbers) - 5, 6):
        assert sorted(numbers[begin:begin + 6]) == list(range(6))
    for (row, _), (following, number) in itertools.pairwise(seen):
        if following != row:  # it did not fit
            used = sum(lengths[n] for r, n in seen if r == row)
            assert used + lengths[number] > 32


def rows_of(files: dict[str, str], tokenizer) -> Rows:
    data = [{"kind": "text", "path": files["text"], "document_length": 40,
             "upsample": {"min_length": 60, "factor": 1.5}}, *sources(files)[1:]]
    return load_rows(choose(files, None, {0: 1, 2: 1}, data=data), tokenizer)


def test_documents_of_a_row_are_known_before_it_is_built(files, tokenizer):
    rows, again = rows_of(files, tokenizer), rows_of(files, tokenizer)
    for phase in (1, 0):
        for index in range(59, -1, -7):
            row = again.row(phase, index)
            assert rows.documents(phase, index) == np.diff(row.cu_seqlens).tolist()
            np.testing.assert_array_equal(rows.row(phase, index).labels, row.labels)
            if row.source == files["text"]:
                assert np.diff(row.cu_seqlens).max() <= 40


def test_joined_documents_are_one(files, tokenizer):
    """The same tokens and labels; only what sees what differs."""
    data = [{"kind": "text", "path": files["text"], "join": joined} for joined in (True, False)]
    rows = load_rows(choose(files, {0: 1}, {1: 1}, data=data), tokenizer)
    joined, apart = (source.row(0, 0, 0, 128) for source in rows.sources)
    assert len(apart.cu_seqlens) > 2 and joined.cu_seqlens.tolist() == [0, 128]
    np.testing.assert_array_equal(joined.input_ids, apart.input_ids)
    np.testing.assert_array_equal(joined.labels, apart.labels)
    assert rows.documents(0, 0) == [128]


@pytest.mark.parametrize("bos", [None, "~"])
def test_a_teacher_reads_joined_documents_in_windows(bos: str | None, files, tokenizer):
    """What it was given too little of to know better than the trained model is left out."""
    window, source = 24, {"kind": "text", "path": files["text"], "join": True}
    tokenizer = with_bos(tokenizer, bos)
    data = [source, source | {"document_length": window, "distill": True}]
    rows = load_rows(choose(files, {0: 1}, {1: 1}, data=data), tokenizer, native_len=64)
    for index in range(20):
        plain, taught = (source.row(0, index, index, 128) for source in rows.sources)
        np.testing.assert_array_equal(taught.input_ids, plain.input_ids)
        assert taught.cu_seqlens.tolist() == [0, 128] and not taught.answers.any()
        starts, ids, labels = taught.windows.cu_seqlens, plain.input_ids.copy(), plain.labels.copy()
        half = max(np.diff(starts)) // 2
        assert np.diff(starts).max() <= window and not taught.kind.is_short
        for begin, end in itertools.pairwise(starts):
            if plain.labels[begin] != IGNORE:  # inside a document
                labels[begin:min(begin + half, end)] = IGNORE
                ids[begin] = ids[begin] if bos is None else tokenizer.convert_tokens_to_ids(bos)
        np.testing.assert_array_equal(taught.labels, labels)
        np.testing.assert_array_equal(taught.windows.input_ids, ids)
        assert 0.3 < (labels != IGNORE).mean() < 0.9


@pytest.mark.parametrize("length", [16, 32, 64])
def test_rows_shorter_than_a_window_teach_too(length: int, files, tokenizer):
    data = [{"kind": "text", "path": files["text"], "join": True, "distill": True,
             "document_length": 64}]
    run = TrainOptions(model="m", data=data, schedule=[{"length": length, "steps": 30, "lr": 1}])
    rows = load_rows(run, tokenizer, native_len=64)
    taught = [(rows.row(0, index).labels != IGNORE).sum() for index in range(30)]
    assert min(taught) > 0 and sum(taught) > 0.3 * 30 * length


def test_text_of_one_file_may_be_two_sources(files, tokenizer):
    """Short documents in one share of the rows, whole ones in another."""
    data = [{"kind": "text", "path": files["text"], "name": "short", "document_length": 32},
            {"kind": "text", "path": files["text"], "name": "long"}]
    rows = load_rows(choose(files, {"short": 1}, {"long": 1}, data=data), tokenizer)
    assert max(rows.documents(0, 0)) <= 32 < max(rows.documents(1, 0))
    lines = [json.loads(line) for line in Path(files["text"]).read_text().splitlines()]
    assert len(rows.sources[0].stream.documents.offsets) == len(lines) + 1
