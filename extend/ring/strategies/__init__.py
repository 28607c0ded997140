"""How attention is computed over the ranks that hold a sequence; any of them for any layout.

    ring          one rank's keys at a time; the least memory
    all-gather    all keys at once, for some heads at a time; the fewest and largest kernel calls
    ulysses       heads split over all ranks in place of the sequence
    usp:U         heads split over groups of U ranks, a ring over the groups
    double-ring:H a ring inside each of H hosts and a ring of hosts, so that the slow link is used
                  once a turn of the inner ring; without a number, the hosts that the ranks run on
    auto          the fastest of them by `extend.ring.cost` that fits in memory
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from extend.errors import CompatibilityError, RecipeError
from extend.registry import lookup
from extend.ring.call import Call
from extend.ring.comm import subcomm
from extend.ring.layouts import ulysses_ranks
from extend.ring.strategies.allgather import AllGather
from extend.ring.strategies.ring import Ring
from extend.ring.strategies.ulysses import Strategy, Ulysses

__all__ = ["STRATEGIES", "Strategy", "build_strategy", "divides", "parse_strategy"]


def parse_strategy(name: str) -> tuple[str, int | None]:
    """`"usp:4"` -> ("usp", 4); a name without a number has None.

    Raises:
        RecipeError: no such strategy, or a number that is none or does not belong to it.
    """
    family, colon, number = name.partition(":")
    lookup({"auto": None} | STRATEGIES, family, "strategy")
    if not colon:
        return family, None
    if family not in ("usp", "double-ring") or not number.isdecimal() or int(number) < 1:
        raise RecipeError(
            f"strategy: {name!r} is not understood; only usp and double-ring take a number, as in "
            "'usp:4' (ranks that share heads) or 'double-ring:2' (hosts)"
        )
    return family, int(number)


def divides(family: str, parts: int, num_heads: int, world: int) -> bool:
    """Whether `parts` (ranks that share heads; hosts of a double ring) come out even."""
    return world % parts == 0 and (family == "double-ring" or num_heads % parts == 0)


def build_strategy(name: str, call: Call, q: Tensor, k: Tensor) -> Strategy:
    """The strategy called `name` (not "auto") for tensors like q [b, h, s, d], k [b, h_kv, s, d].

    Raises:
        CompatibilityError: these heads or ranks cannot be split that way.
        RecipeError: no such strategy.
    """
    family, number = parse_strategy(name)
    if call.comm.world == 1:
        return Ring(call)
    return STRATEGIES[family](call, number, q.shape[1], k.shape[1])


def _ring(call: Call, number: None, num_heads: int, num_kv_heads: int) -> Strategy:
    return Ring(call)


def _all_gather(call: Call, number: None, num_heads: int, num_kv_heads: int) -> Strategy:
    return AllGather(call)


def _ulysses(call: Call, number: None, num_heads: int, num_kv_heads: int) -> Strategy:
    return _usp(call, call.comm.world, num_heads, num_kv_heads)


def _usp(call: Call, degree: int | None, num_heads: int, num_kv_heads: int) -> Strategy:
    comm = call.comm
    if degree is None:
        degree = _default_degree(comm.world, comm.world // comm.hosts, num_heads)
    if not divides("usp", degree, num_heads, comm.world):
        raise CompatibilityError(
            f"strategy {'ulysses' if degree == comm.world else f'usp:{degree}'}: {num_heads} query "
            f"heads and {comm.world} ranks; {degree} ranks that share heads must divide both"
        )
    members = ulysses_ranks(call.layout, comm.rank, comm.world, degree)
    place = members.index(comm.rank)
    peers = sorted(
        {ulysses_ranks(call.layout, r, comm.world, degree)[place] for r in range(comm.world)}
    )
    heads, ring = subcomm(comm, members), subcomm(comm, tuple(peers))
    inner = Ring(replace(call, comm=ring))
    return Ulysses(
        heads, inner, call.layout, call.seq_len, members, comm.world, num_heads, num_kv_heads
    )


def _double_ring(call: Call, hosts: int | None, num_heads: int, num_kv_heads: int) -> Strategy:
    comm = call.comm
    hosts = comm.hosts if hosts is None else hosts
    if not divides("double-ring", hosts, num_heads, comm.world):
        raise CompatibilityError(
            f"strategy double-ring:{hosts}: {comm.world} ranks do not divide over {hosts} hosts; "
            f"choose a number that divides {comm.world}"
        )
    per_host = comm.world // hosts
    host, place = divmod(comm.rank, per_host)
    inner = subcomm(comm, tuple(range(host * per_host, (host + 1) * per_host)))
    outer = subcomm(comm, tuple(range(place, comm.world, per_host)))
    return Ring(call, inner, outer)


def _default_degree(world: int, per_host: int, num_heads: int) -> int:
    """The largest number of ranks of one host, short of all ranks, that share the heads evenly."""
    for degree in range(min(per_host, world - 1), 1, -1):
        if divides("usp", degree, num_heads, world):
            return degree
    raise CompatibilityError(
        f"strategy usp: no number between 1 and {world} divides {num_heads} query heads and "
        f"{world} ranks; use ring or all-gather"
    )


STRATEGIES: dict[str, Callable[[Call, int | None, int, int], Strategy]] = {
    "ring": _ring,
    "all-gather": _all_gather,
    "ulysses": _ulysses,
    "usp": _usp,
    "double-ring": _double_ring,
}
