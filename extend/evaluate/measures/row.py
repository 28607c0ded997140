"""What every row of results says of its prompts."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from extend.evaluate.tasks.task import Cell, Prompt

DIGITS = 6  # of stored losses: more would differ from one number of threads to another


def describe_prompts(cell: Cell, prompts: Sequence[Prompt], seed: int) -> dict[str, Any]:
    """The cell, and length, depth and hashes of its prompts."""
    return {"task": cell.task, "name": cell.name, "length": cell.length,
            "actual_length": max(prompt.length for prompt in prompts), "depth": cell.depth,
            "actual_depth": _mean_depth(prompts), "control": cell.control, "seed": seed,
            "prompt_sha256": hash_prompts(prompts),
            "trial_sha256": [hash_ids(prompt.ids) for prompt in prompts]}


def _mean_depth(prompts: Sequence[Prompt]) -> float | None:
    depths = [p.details["actual_depth"] for p in prompts if "actual_depth" in p.details]
    return round(sum(depths) / len(depths), 6) if depths else None


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """One sha256 of all ids of the cell: the same on every machine with this tokenizer.

    Hashed are, of each prompt in turn, its length (8 bytes) and its ids (4 bytes each), little
    endian.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(_written(prompt.ids))
    return digest.hexdigest()


def hash_ids(ids: Sequence[int]) -> str:
    """The sha256 of one prompt's ids."""
    return hashlib.sha256(_written(ids)).hexdigest()


def _written(ids: Sequence[int]) -> bytes:
    return len(ids).to_bytes(8, "little") + np.asarray(ids, dtype="<i4").tobytes()
