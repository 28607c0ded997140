"""Other implementations, as published, on the same tensors.

    torch-allgather, torch-alltoall   torch.distributed's context_parallel, head-tail balanced
    ulysses                           all-to-all over heads and torch's own attention, nothing else
    rfa-ring, rfa-zigzag, rfa-stripe  ring-flash-attn; packed: rfa-zigzag and rfa-llama3
    yunchang:U                        LongContextAttention, U ranks exchange heads, zigzag ring

The first three lines take the kernel after @ (cudnn, flash); ring-flash-attn and yunchang run on
torch's flash kernel behind flash_attn's interface (flash_attn_shim.py), or on fa3 or fa4 after @.
"""

import importlib
import itertools
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from extend.errors import CompatibilityError
from extend.ring import KERNELS, LAYOUTS
from ring_bench import flash_attn_shim
from ring_bench.contenders import Forward
from ring_bench.flash_attn_shim import flash_impl
from ring_bench.problems import Problem
from ring_bench.session import Session

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
DEFAULT_PEERS = (
    "torch-allgather@cudnn,torch-alltoall@cudnn,ulysses@cudnn,rfa-ring,rfa-zigzag,rfa-stripe,"
    "rfa-llama3,yunchang:2"
)


class Peer(NamedTuple):
    """One other implementation; `kernel` is the one of ours that it is compared with."""

    entry: str
    family: str = "peer"

    @property
    def name(self) -> str:
        return self.entry if "@" in self.entry else f"{self.entry}@flash"

    @property
    def kernel(self) -> str:
        return self.name.partition("@")[2]

    @property
    def kind(self) -> str:
        return self.name.partition("@")[0].partition(":")[0]

    @property
    def degree(self) -> int:
        return int(self.entry.partition("@")[0].partition(":")[2] or 2)

    def positions(self, problem: Problem, rank: int, world: int) -> Tensor:
        """Which positions of the sequence a rank holds, int64 [s / world]."""
        if self.kind in ("ulysses", "rfa-ring", "rfa-llama3"):
            return LAYOUTS["contiguous"].positions(problem.seq_len, rank, world)
        if self.kind == "rfa-stripe":
            return LAYOUTS["striped"].positions(problem.seq_len, rank, world)
        zigzag = LAYOUTS["zigzag"].positions
        if self.kind == "yunchang":  # zigzag over the groups, then in turn inside a group
            held = zigzag(problem.seq_len, rank // self.degree, world // self.degree)
            return held.chunk(self.degree)[rank % self.degree]
        bounds = problem.cu_seqlens or (0, problem.seq_len)  # ring-flash-attn cuts every document
        return torch.cat([a + zigzag(b - a, rank, world) for a, b in itertools.pairwise(bounds)])

    def rows(self, problem: Problem, session: Session) -> int:
        return problem.seq_len // session.world

    def build(self, problem: Problem, session: Session) -> Forward:
        """The call.

        Raises:
            ImportError: the package is not there.
            CompatibilityError: it has no such mask, or no such peer is known.
        """
        if self.kind not in BUILDERS:
            raise CompatibilityError(f"no peer {self.kind!r}; there are {', '.join(BUILDERS)}")
        if problem.window or not problem.causal:
            raise CompatibilityError(f"no mask {problem.mask!r}")
        if bool(problem.cu_seqlens) and self.kind not in ("rfa-zigzag", "rfa-llama3"):
            raise CompatibilityError("no packed documents")
        if not problem.cu_seqlens and self.kind == "rfa-llama3":
            raise CompatibilityError("packed documents only")
        return BUILDERS[self.kind](self, problem, session)

    def context(self) -> AbstractContextManager[Any]:
        if self.kind == "ulysses":
            return self._backend()
        if self.kind.startswith("torch-"):
            return self._context_parallel()
        return flash_impl(getattr(KERNELS.get(self.kernel), "version", None))

    @contextmanager
    def _backend(self):
        if not torch.cuda.is_available():
            yield
            return
        with flash_impl(None), sdpa_kernel(BACKENDS[self.kernel]):
            yield

    @contextmanager
    def _context_parallel(self):
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import set_rotate_method

        set_rotate_method(self.kind.removeprefix("torch-"))
        mesh = _mesh()
        # Tensors are sharded already: only the patched attention is wanted, so one small buffer.
        buffer = torch.zeros(2 * mesh.size(), device=mesh.device_type)
        with ExitStack() as stack:
            stack.enter_context(self._backend())
            stack.enter_context(context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0]))
            yield


@cache
def _mesh():
    from torch.distributed.device_mesh import init_device_mesh

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(device, (dist.get_world_size(),))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, whose kernel the context chooses."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Exchange(torch.autograd.Function):
    """[1, h, s / n, d] -> [1, h / n, s, d] (to_heads), or back."""

    @staticmethod
    def forward(ctx, x: Tensor, to_heads: bool) -> Tensor:
        ctx.to_heads, n = to_heads, dist.get_world_size()
        _, h, s, d = x.shape
        if to_heads:
            parts = x.reshape(n, h // n, s, d).contiguous()
        else:
            parts = x.reshape(h, n, s // n, d).transpose(0, 1).contiguous()
        got = torch.empty_like(parts)
        dist.all_to_all_single(got, parts)
        if to_heads:
            return got.permute(1, 0, 2, 3).reshape(1, h // n, n * s, d)
        return got.reshape(1, n * h, s // n, d)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return Exchange.apply(grad, not ctx.to_heads), None


def build_torch(peer: Peer, problem: Problem, session: Session) -> Forward:
    return attention


def build_ulysses(peer: Peer, problem: Problem, session: Session) -> Forward:
    if problem.kv_heads % session.world:
        raise CompatibilityError(f"{problem.kv_heads} KV heads, {session.world} ranks")

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (Exchange.apply(t, True) for t in (q, k, v))
        return Exchange.apply(attention(q, k, v), False)

    return forward


def build_rfa(peer: Peer, problem: Problem, session: Session) -> Forward:
    package = import_ring_flash_attn()
    if problem.cu_seqlens:
        return _rfa_packed(peer, package, problem, session)
    names = {"rfa-ring": "ring_flash_attn_func", "rfa-zigzag": "zigzag_ring_flash_attn_func",
             "rfa-stripe": "stripe_flash_attn_func"}  # fmt: skip
    function = getattr(package, names[peer.kind])
    return _sequence_first(lambda q, k, v: function(q, k, v, causal=True))


def _rfa_packed(peer: Peer, package: Any, problem: Problem, session: Session) -> Forward:
    whole = problem.cu_tensor(session.device)
    if peer.kind == "rfa-zigzag":  # every document is cut zigzag
        local = whole // session.world
        longest = int((local[1:] - local[:-1]).max())
        function = package.zigzag_ring_flash_attn_varlen_func
        return _token_first(lambda q, k, v: function(q, k, v, local, longest, causal=True))
    cu_q, cu_k, max_q, max_k, keys = package.llama3_flash_attn_prepare_cu_seqlens(
        whole, True, session.rank, session.world
    )
    function = package.llama3_flash_attn_varlen_func
    return _token_first(lambda q, k, v: function(
        q, k, v, cu_q, cu_k, max_q, max_k, heads_k_stride=1, local_k_slice=keys, causal=True
    ))  # fmt: skip


def build_yunchang(peer: Peer, problem: Problem, session: Session) -> Forward:
    yunchang = import_yunchang()
    degree = peer.degree
    if session.world % degree or problem.kv_heads % degree:
        raise CompatibilityError(
            f"{session.world} ranks or {problem.kv_heads} KV heads do not divide by {degree}"
        )
    groups = _yunchang_groups(degree, session.rank, session.world)
    found = importlib.import_module("yunchang.globals").PROCESS_GROUP
    found.ULYSSES_PG, found.RING_PG = groups
    layer = yunchang.LongContextAttention(ring_impl_type="zigzag")
    return _sequence_first(lambda q, k, v: layer(q, k, v, causal=True))


@cache
def _yunchang_groups(degree: int, rank: int, world: int) -> tuple[Any, Any]:
    """Its process groups, made once: each costs a communicator."""
    import_yunchang().set_seq_parallel_pg(degree, world // degree, rank, world)
    found = importlib.import_module("yunchang.globals").PROCESS_GROUP
    return found.ULYSSES_PG, found.RING_PG


def _sequence_first(function: Forward) -> Forward:
    """`function` of [b, s, h, d], for tensors [b, h, s, d]."""
    return lambda *tensors: function(*(t.transpose(1, 2) for t in tensors)).transpose(1, 2)


def _token_first(function: Forward) -> Forward:
    """`function` of [s, h, d], for tensors [1, h, s, d]."""
    return lambda *tensors: function(*(t[0].transpose(0, 1) for t in tensors)).transpose(0, 1)[None]


@cache
def import_ring_flash_attn() -> Any:
    """The package without its Hugging Face adapter, which transformers 5 does not import."""
    flash_attn_shim.install()
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules["ring_flash_attn.adapters"] = adapters
    return importlib.import_module("ring_flash_attn")


@cache
def import_yunchang() -> Any:
    flash_attn_shim.install()
    return importlib.import_module("yunchang")


def add_wheels(folder: Path | None) -> list[str]:
    """Make the pure Python wheels in `folder` importable; their names.

    Unpacked, since torch.jit and Triton read the source of what they compile.
    """
    wheels = sorted(folder.glob("*-none-any.whl")) if folder else []
    if wheels:
        target = tempfile.mkdtemp(prefix="ring_peers_")
        for wheel in wheels:
            zipfile.ZipFile(wheel).extractall(target)
        sys.path.append(target)
    return [wheel.name for wheel in wheels]


def parse_peers(entries: str) -> list[Peer]:
    """`name[:degree][@kernel],...` as contenders; empty for none."""
    return [Peer(entry) for entry in entries.split(",") if entry]


BUILDERS: dict[str, Callable[[Peer, Problem, Session], Forward]] = {
    "torch-allgather": build_torch,
    "torch-alltoall": build_torch,
    "ulysses": build_ulysses,
    "rfa-ring": build_rfa,
    "rfa-zigzag": build_rfa,
    "rfa-stripe": build_rfa,
    "rfa-llama3": build_rfa,
    "yunchang": build_yunchang,
}
