"""Merges that learn from unlabelled prompts, by `extend.transfer`, on the model in memory."""

from collections.abc import Mapping
from typing import Any

from .bench import Case
from .deltas import Delta


def repair(case: Case, source: str) -> Mapping[str, Any]:
    raise NotImplementedError


def fit(case: Case, source: str) -> tuple[Delta, float]:
    raise NotImplementedError
