"""The merges of each group: what is added to a target, and under which RoPE.

A recipe is a name and a function from the case (target, long model) to the change. All deltas are
whole and in fp32 unless the name says otherwise.
"""

from collections.abc import Callable
from functools import partial

import torch

from extend.merge.methods import METHODS
from extend.model_config import RopeSpec
from extend.rope.analysis import pair_movement
from extend.rope.frequencies import inv_freq, turns
from extend.rope.methods import apply_method

from . import deltas, learned
from .bench import RANKS, Case, Change
from .deltas import Delta

Make = Callable[[Case], Change]
NOISE_LIMIT = 512
CONFLICT_RANK = 16


def whole(case: Case, weight: float = 1.0) -> Change:
    return Change(case.delta, weight)


def rope_alone(case: Case) -> Change:
    """No delta. What is told of the two deltas goes with this row."""
    return Change({}, numbers=conflict(case))


def conflict(case: Case) -> dict[str, float]:
    """How the deltas of target and long model lie to one another, and what the RoPE moves."""
    native, after = inv_freq(case.bench.native), inv_freq(case.long.rope)
    movement = pair_movement(native, after, case.bench.native.original_len)
    numbers = {"movement": float(movement.mean()),
               "long_drift": case.bench.subject.drift(case.delta)}
    if case.target.skill is None:
        return numbers
    ours, theirs = (case.bench.subspaces(of) for of in (case.target, case.long_name))
    drift = case.bench.subject.drift(case.own_delta)
    return {**numbers, "target_drift": drift, "drift_ratio": numbers["long_drift"] / drift,
            "cosine": deltas.cosine(case.own_delta, case.delta),
            **ours.overlap(theirs, CONFLICT_RANK)}


# ---- rank, norms, embeddings ---------------------------------------------------------------------

def at_rank(case: Case, rank: int, norms: bool = True) -> Change:
    factors = case.bench.factors(case.long_name)
    return _low_rank(case, deltas.cut(factors, rank), norms, deltas.size_of(factors, rank))


def above_noise(case: Case) -> Change:
    base = case.bench.subject.base
    factors = deltas.factorize_above_noise(base, case.delta, NOISE_LIMIT)
    return _low_rank(case, deltas.cut(factors), True, deltas.size_of(factors))


def _low_rank(case: Case, matrices: Delta, norms: bool, numbers: dict[str, float]) -> Change:
    kept = deltas.norms(case.delta) if norms else {}
    side = sum(4 * d.numel() for d in kept.values())
    return Change({**matrices, **kept}, numbers={**numbers, "sidecar_bytes": side})


def folded(case: Case, rank: int | None = None) -> Change:
    """Norms of the layers inside the matrices; the last norm left out."""
    delta = deltas.fold_norms(case.bench.subject.base, case.delta)
    if rank is None:
        return Change(delta)
    factors = deltas.factorize(delta, rank)
    return Change(deltas.cut(factors), numbers=deltas.size_of(factors))


def only(case: Case, wanted: Callable[[str], bool]) -> Change:
    """The part of the delta whose names are wanted."""
    part = deltas.select(case.delta, wanted)
    return Change(part, numbers={"share": (deltas.norm(part) / deltas.norm(case.delta)) ** 2})


def matrices_only(case: Case) -> Change:
    return Change(deltas.matrices(case.delta))


def without_embeddings(case: Case) -> Change:
    return only(case, lambda name: "embed_tokens" not in name)


def third(case: Case, number: int) -> Change:
    count = case.bench.num_layers
    return only(case, lambda name: deltas.in_third(name, number, count))


# ---- what decides it -----------------------------------------------------------------------------

def native_rope(case: Case) -> Change:
    return Change(case.delta, rope=case.bench.native)


def some_pairs(case: Case, low: float, high: float) -> Change:
    """The long model's frequencies for pairs of so many native turns, native ones for the rest."""
    return Change(case.delta, rope=mix_rope(case.bench.native, case.long.rope, case.long.length,
                                            low, high))


def mix_rope(native: RopeSpec, changed: RopeSpec, length: int, low: float,
             high: float) -> RopeSpec:
    """`changed` for pairs that turn more than `low` and at most `high` times natively."""
    ratio, count = inv_freq(native) / inv_freq(changed), turns(native)
    ratio = ratio.where((count > low) & (count <= high), ratio.new_ones(()))
    return apply_method("longrope", native, length, {"long_factor": ratio.tolist()})


def random_delta(case: Case) -> Change:
    return Change(deltas.random_like(case.delta, case.bench.seed))


def shuffled(case: Case) -> Change:
    return Change(deltas.shuffled(case.delta, case.bench.seed))


# ---- mergers -------------------------------------------------------------------------------------

def orthogonal(case: Case, rank: int, side: str = "both") -> Change:
    delta = case.bench.subspaces(case.target).remove_from(case.delta, rank, side)
    return Change(delta, numbers=_kept(case, delta))


def drift_aware(case: Case) -> Change:
    method, base = METHODS["drift-aware"](), case.bench.subject.base
    delta = {name: method.adjust(name, d.clone(), base[name] + case.own_delta.get(name, 0 * d),
                                 base[name]) for name, d in case.delta.items()}
    return Change(delta, numbers=_kept(case, delta))


def ties(case: Case, density: float) -> Change:
    return Change(deltas.ties([case.own_delta, case.delta], density), own=0)


def dare(case: Case, density: float) -> Change:
    return Change(deltas.dare(case.delta, density, case.bench.seed))


def stored(case: Case) -> Change:
    """What a merge writes: one rounding to bfloat16."""
    return Change(case.delta, stored=torch.bfloat16)


def _kept(case: Case, delta: Delta) -> dict[str, float]:
    return {"share": (deltas.norm(delta) / deltas.norm(case.delta)) ** 2}


def repaired(case: Case, source: str, before: Make = whole) -> Change:
    """A merge, then a few steps towards the target's own answers."""
    change = before(case)
    return Change(change.delta, change.weight, numbers=change.numbers,
                  finish=partial(learned.repair, source=source))


def fitted(case: Case, source: str) -> Change:
    """The delta with a weight for each group of parameters, fitted on unlabelled prompts."""
    delta, numbers = learned.fit(case, source)
    return Change(delta, numbers=numbers)


# ---- the groups ----------------------------------------------------------------------------------

GROUPS: dict[str, dict[str, Make]] = {
    "main": {"RoPE alone": rope_alone, "whole": whole, "weight 0.5": partial(whole, weight=0.5)},
    "rank": {**{f"rank {rank}": partial(at_rank, rank=rank) for rank in RANKS},
             "noise rule (bfloat16)": above_noise, "whole, stored in bfloat16": stored},
    "norms": {"without norms": matrices_only, "norms folded": folded,
              "rank 32, without norms": partial(at_rank, rank=32, norms=False),
              "rank 32, norms folded": partial(folded, rank=32),
              "norms alone": partial(only, wanted=lambda name: "norm" in name)},
    "embeddings": {"RoPE alone": rope_alone, "whole": whole,
                   "without embeddings": without_embeddings,
                   "embeddings alone": partial(only, wanted=lambda name: "embed_tokens" in name),
                   "rank 32, without embeddings": partial(at_rank, rank=32)},
    "ablations": {"native RoPE": native_rope, "shuffled": shuffled, "random": random_delta,
                  "attention alone": partial(only, wanted=lambda name: ".self_attn." in name),
                  "MLPs alone": partial(only, wanted=lambda name: ".mlp." in name),
                  "first third": partial(third, number=0), "middle third": partial(third, number=1),
                  "last third": partial(third, number=2),
                  "only pairs of > 32 turns moved": partial(some_pairs, low=32, high=float("inf")),
                  "only pairs of 4-32 turns moved": partial(some_pairs, low=4, high=32),
                  "only pairs of <= 4 turns moved": partial(some_pairs, low=0, high=4),
                  "weight 0.25": partial(whole, weight=0.25),
                  "weight 1.25": partial(whole, weight=1.25)},
    "mergers": {"weight 0.7": partial(whole, weight=0.7), "drift-aware": drift_aware,
                "orthogonal 8": partial(orthogonal, rank=8),
                "orthogonal 32": partial(orthogonal, rank=32),
                "orthogonal 128": partial(orthogonal, rank=128),
                "orthogonal 32, left": partial(orthogonal, rank=32, side="left"),
                "orthogonal 32, right": partial(orthogonal, rank=32, side="right"),
                "TIES 0.5": partial(ties, density=0.5), "DARE 0.5": partial(dare, density=0.5)},
    "learned": {"repair, own prompts": partial(repaired, source="own"),
                "fit, own prompts": partial(fitted, source="own"),
                "orthogonal 32 + repair, own prompts":
                    partial(repaired, source="own", before=partial(orthogonal, rank=32))},
    "learned-other": {"repair, other prompts": partial(repaired, source="other"),
                      "repair, no prompts": partial(repaired, source="none"),
                      "fit, other prompts": partial(fitted, source="other")},
    "far": {"whole": whole, "RoPE alone": rope_alone,
            "orthogonal 32": partial(orthogonal, rank=32),
            "repair, own prompts": partial(repaired, source="own")},
}
"""group -> name -> recipe, in the order in which they are done."""
