import re

import pytest

from extend.evaluate.score import proportion
from extend.evaluate.summary import summarize
from extend.evaluate.summary_text import summary_text


def row(name="passkey", length=512, correct=5, n=5, **other):
    return {"task": "passkey", "name": name, "length": length, "depth": 0.5, "control": None,
            "beyond_native": length is not None and length > 1024, "correct": correct,
            **proportion(correct, n), **other}


def loss_row(name, **other):
    return {"task": "loss", "name": name, "length": 2048, "depth": None, "control": None,
            "loss": 2.5, "stderr": 0.1, "n": 4, "tokens": 8188, "score": None, **other}


CURVE = loss_row("positions", task="loss-by-position", slope_per_doubling=-0.01, slope_stderr=0.002,
                 curve=[{"begin": 1, "end": 2048, "loss": 2.5, "stderr": 0.1, "tokens": 8188}])
DIVERGENCE = loss_row("from-base", task="divergence", reference_loss=2.4, kl=0.03, kl_stderr=0.001,
                      agreement=0.9)


def test_trials_are_pooled_over_depths():
    summary = summarize([
        row(correct=5), row(correct=2), row(length=2048, correct=0),
        row(correct=1, control="no-needle", depth=None),
        row("json", None, 9, 10, task="exact-match", depth=None), loss_row("prose"), CURVE,
        DIVERGENCE], {"passkey": 1 / 90000})
    task = summary["tasks"]["passkey"]
    assert task["lengths"] == {"512": {**proportion(7, 10), "beyond_native": False},
                               "2048": {**proportion(0, 5), "beyond_native": True}}
    assert task["controls"] == {"no-needle": {"length": 512, **proportion(1, 5)}}
    assert task["chance"] == 1 / 90000 and task["own_rule"]["length"] == 512
    assert summary["skills"] == {"json": proportion(9, 10)}
    mean = {"loss": 2.5, "stderr": 0.1, "n": 4, "tokens": 8188, "length": 2048}
    assert summary["losses"] == {"prose": mean}
    assert summary["curves"] == {"positions": {
        **mean, "slope_per_doubling": -0.01, "slope_stderr": 0.002, "curve": CURVE["curve"]}}
    assert summary["divergences"] == {"from-base": {
        **mean, "reference_loss": 2.4, "kl": 0.03, "kl_stderr": 0.001, "agreement": 0.9}}
    assert summary["warnings"] == [
        "passkey, no-needle: 20 % (1/5; 4-62) is above chance, 0.0011 %: answers leak or can be "
        "guessed", "passkey: the score at 512, the shortest length asked, is only 70 % (7/10; "
        "40-89), and the effective length says no more than up to where it holds"]


def test_losses_at_several_lengths_stand_beside_one_another():
    nothing = loss_row("keys", loss=None, stderr=None, tokens=0)
    summary = summarize([loss_row("slide"), loss_row("slide", length=4096, loss=2.0), nothing])
    assert {name: entry["loss"] for name, entry in summary["losses"].items()} == {
        "slide 2K": 2.5, "slide 4K": 2.0}  # nothing is said of a text without key tokens
    assert "slide 4K: 2.0000 nats a token over 8188 tokens" in summary_text(summary)


def test_effective_length_is_the_weakest_tasks():
    rows = [row("a", 512), row("a", 1024), row("b", 512), row("b", 1024, correct=2)]
    summary = summarize(rows)
    assert summary["effective_length"] == 512
    assert summary["effective_lengths"]["own"]["limited_by"] == "b"
    assert summary["effective_lengths"]["ruler"] is None
    assert summarize(rows[:2])["effective_length"] == 1024
    assert summarize([])["effective_length"] is None


def graded(name, length, grades, **other):
    return {**row(name, length, sum(g == 1 for g in grades), len(grades), task=name),
            **proportion(sum(grades), len(grades)), "depth": None, "truncated": 0.0, "empty": 0.0,
            **other}


def test_ruler_tasks_are_averaged_with_their_parts_of_answers():
    rows = [graded("ruler-vt", 512, [1.0, 0.8, 1.0, 0.8]), graded("ruler-cwe", 512, [0.9] * 4),
            graded("ruler-vt", 1024, [1.0] * 4), graded("ruler-cwe", 1024, [0.6] * 4)]
    ruler = summarize([*rows, row("passkey", 512), row("passkey", 1024)])[
        "effective_lengths"]["ruler"]
    assert ruler["tasks"] == ["ruler-vt", "ruler-cwe"]
    assert {length: (e["score"], e["n"]) for length, e in ruler["lengths"].items()} == {
        "512": (0.9, 8), "1024": (0.8, 8)}
    assert (ruler["length"], ruler["length_low"]) == (512, 0)


def test_lost_answers_are_pooled_and_warned_of():
    rows = [graded("bAbI", 512, [1.0] * 10, truncated=0.1, depth=0.0),
            graded("bAbI", 512, [1.0] * 30, truncated=0.0, empty=0.2, depth=1.0),
            graded("bAbI", 1024, [1.0] * 10, truncated=0.1)]
    summary = summarize(rows)
    found = summary["tasks"]["bAbI"]["lengths"]
    assert (found["512"]["truncated"], found["512"]["empty"]) == (0.025, 0.15)
    assert summary["warnings"] == [
        "bAbI at 1K: 10 % of 10 answers are cut off before they ended: more room for them may "
        "raise the score", "bAbI at 512: 15 % of 40 answers are empty"]
    worse = summarize([*rows, graded("bAbI", 2048, [1.0] * 10, truncated=0.3)])["warnings"][0]
    assert worse.startswith("bAbI at 1K, 2K: 30 % of 10 answers at the worst are cut off")


def test_what_the_rules_rest_on_is_doubted():
    nothing = summarize([row(correct=0), row(length=1024)])
    assert nothing["effective_length"] == 0
    assert nothing["warnings"] == ["passkey: its score at 512, the shortest length asked, is not "
                                   "surely above chance, so no length counts"]
    beyond, = summarize([row(length=2048)])["warnings"]
    assert "2K, the shortest length asked, is beyond the model's own context" in beyond


@pytest.mark.parametrize("single", [
    row("keys", 512, 4, depth=0.5), row("stream", 512, 4, control="single-needle", depth=0.5)])
def test_a_streaming_grid_stands_beside_single_facts(single):
    rows = [row("stream", 512, 3, task="passkey-stream", stream=True, depth=0.5),
            row("stream", 512, 1, task="passkey-stream", stream=True, depth=1.0)]
    assert summarize(rows)["tasks"]["stream"]["spot_check"] is None
    summary = summarize([*rows, single])
    assert summary["tasks"]["stream"]["spot_check"] == {
        "cells": 1, "single": proportion(4, 5), "stream": proportion(3, 5)}
    text = summary_text(summary)
    assert "stream (many facts in one prompt: harder): 512 40 % (4/10; 17-69)" in text
    assert ("stream, spot check: 80 % (4/5; 38-96) with one fact a prompt, 60 % (3/5; 23-88) in "
            "the stream, at the same 1 cell") in text


def test_text_never_says_a_share_without_its_number_of_prompts():
    text = summary_text(summarize([
        row("passkey", 512), row("passkey", 1024), row(correct=0, control="no-context", depth=None),
        graded("ruler-vt", 512, [1.0, 0.8]), row("json", None, 10, 10, task="exact-match",
                                                 depth=None), loss_row("prose"), CURVE,
        DIVERGENCE]))
    assert text.splitlines() == [
        "passkey: 512 100 % (5/5; 57-100), 1K 100 % (5/5; 57-100), no-context 0 % (0/5; 0-43)",
        "ruler-vt: 512 90 % (n = 2; 28-100)", "json: 100 % (10/10; 72-100)",
        "prose: 2.5000 nats a token over 8188 tokens",
        "positions: 2.5000 nats a token, -0.0100 +/- 0.0020 each time the position doubles",
        "from-base: KL 0.0300 +/- 0.0010 nats a token, the same first choice at 90.00 % of 8188 "
        "tokens",
        "effective length by 85 % of the own short score: 512 or more (ruler-vt, the smallest of 2 "
        "tasks, 90 % (n = 2; 28-100) at 512; at least 2 prompts a length; by the lower ends of "
        "the intervals none)",
        "effective length by RULER's rule, above 85.6 %: 512 or more (mean over 1 of RULER's 13 "
        "tasks: 512 90 % (n = 2; 28-100); by the lower ends of the intervals none)"]
    for share in re.finditer(r"\b100 %(.{0,5})", text):
        assert share[1].startswith(" (")
