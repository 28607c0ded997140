"""Who competes: this package under every strategy, layout and kernel, and one GPU alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from extend.ring import LAYOUTS, RingComm, ring_attention
from extend.ring.attention import attend
from extend.ring.mask import make_mask
from ring_bench.problems import Problem
from ring_bench.session import Session

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Contender(Protocol):
    """One way to compute a problem."""

    name: str
    kernel: str  # whose time on one GPU it is compared with
    family: str  # "one GPU", "ours" or "peer"

    def rows(self, problem: Problem, session: Session) -> int:
        """Tokens that this rank passes in."""
        ...

    def positions(self, problem: Problem, rank: int, world: int) -> Tensor:
        """Which positions of the sequence a rank holds, int64 [s_local]."""
        ...

    def build(self, problem: Problem, session: Session) -> Forward:
        """The call, q, k, v [1, h, s, d] -> out."""
        ...

    def context(self) -> AbstractContextManager[Any]:
        """What must be in force during its calls."""
        ...


class Ours(NamedTuple):
    """ring_attention under one strategy, layout and kernel."""

    strategy: str
    layout: str
    kernel: str
    group: ProcessGroup | None = None
    family: str = "ours"

    @property
    def name(self) -> str:
        layout = "" if self.layout == "zigzag" else f"/{self.layout}"
        return f"{self.strategy}{layout} [{self.kernel}]"

    def rows(self, problem: Problem, session: Session) -> int:
        return problem.seq_len // session.world

    def positions(self, problem: Problem, rank: int, world: int) -> Tensor:
        return LAYOUTS[self.layout].positions(problem.seq_len, rank, world)

    def build(self, problem: Problem, session: Session) -> Forward:
        options = {
            "group": self.group, "layout": self.layout, "strategy": self.strategy,
            "kernel": self.kernel, "causal": problem.causal, "window": problem.window,
            "cu_seqlens": problem.cu_seqlens,
        }  # fmt: skip
        return lambda q, k, v: ring_attention(q, k, v, **options)

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext()


class OneGpu(NamedTuple):
    """The same kernel through the same interface on every GPU for itself: the whole sequence."""

    kernel: str
    local: bool = False  # only as many tokens as each rank has otherwise
    family: str = "one GPU"

    @property
    def name(self) -> str:
        return f"one GPU{', local length' if self.local else ''} [{self.kernel}]"

    def rows(self, problem: Problem, session: Session) -> int:
        return problem.seq_len // session.world if self.local else problem.seq_len

    def positions(self, problem: Problem, rank: int, world: int) -> Tensor:
        return torch.arange(problem.seq_len)

    def build(self, problem: Problem, session: Session) -> Forward:
        comm, rows = RingComm.alone(), self.rows(problem, session)
        bounds = None if self.local else problem.cu_seqlens
        mask = make_mask(problem.causal, problem.window, bounds, rows)
        return lambda q, k, v: attend(q, k, v, comm=comm, mask=mask, kernel=self.kernel)

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext()


def parse_ours(strategies: str, kernels: str) -> list[Ours]:
    """`strategy[/layout],...` times `kernel,...`; zigzag where no layout is given."""
    contenders = []
    for entry in strategies.split(","):
        strategy, _, layout = entry.partition("/")
        for kernel in kernels.split(","):
            contenders.append(Ours(strategy, layout or "zigzag", kernel))
    return contenders
