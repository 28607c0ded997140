"""scripts/train_parity.py: our training against transformers' Trainer, over twenty steps."""

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # as when the script itself is run

import train_parity

TESTED = ("fp32, masks of documents", "fp32, LoRA of rank 8", "bf16")


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    directory = tmp_path_factory.mktemp("parity")
    return argparse.Namespace(
        model=str(train_parity.make_model(directory / "model", layers=1)), length=64, rows=2,
        text=str(train_parity.make_text(directory / "text.jsonl")), steps=20, lr=3e-3,
        directory=directory)


@pytest.fixture(scope="module")
def ours(args: argparse.Namespace) -> dict:
    runs = {case: train_parity.CASES[case] for case in TESTED}
    return train_parity.train_ours(args, runs, 1, args.directory)


@pytest.mark.parametrize("case", [case for case in TESTED if "fp32" in case])
def test_fp32_follows_the_trainer(case: str, args: argparse.Namespace, ours: dict):
    """Only the order of sums differs; Adam makes steps of it where a gradient is all rounding."""
    found = train_parity.compare(ours[case], train_parity.train_theirs(
        args, train_parity.CASES[case], args.directory))
    assert found["lr"] < 1e-12  # the same schedule by another formula
    assert found["first_loss"] < 1e-6 and found["loss"] < 2e-5
    assert found["grad_norm"] < 1e-4 and found["weights"] < 1e-3


def test_bf16_differs_by_its_rounding(args: argparse.Namespace, ours: dict):
    """From fp32 and from the Trainer, which computes under autocast: norms and sums in fp32.

    A value is rounded by up to 2**-9 of itself; so is a loss, at most, which is a mean of many.
    """
    exact, mixed = ours["fp32, masks of documents"], ours["bf16"]
    theirs = train_parity.train_theirs(args, train_parity.CASES["bf16"], args.directory)
    most = 2**-9 * min(exact[0]["loss"])
    assert 1e-5 < train_parity.compare(exact, mixed)["loss"] < most
    assert 1e-5 < train_parity.compare(mixed, theirs)["loss"] < most


def test_the_report_names_every_case(args: argparse.Namespace, ours: dict):
    same = train_parity.compare(ours["bf16"], ours["bf16"])
    assert same["same_bits"] and same["loss"] == 0
    steps = {case: {"ours": run[0], "theirs": run[0]} for case, run in ours.items()}
    text = train_parity.render(args, {
        "cases": dict.fromkeys(ours, same), "to_fp32": {"ours": same, "theirs": same},
        "steps": steps, "variants": {"2 processes": {"fp32": same, "bf16": same}}}, "how")
    assert all(f"| {case} | 0.0e+00" in text for case in TESTED)
    assert "| 2 processes | the same bits | the same bits |" in text and "| 20 |" in text
