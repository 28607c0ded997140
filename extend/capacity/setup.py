"""What a step is computed on and how: the machine, the layout, the options that cost memory or
time. Plain numbers, no torch.
"""

from dataclasses import dataclass, replace
from typing import Literal

from extend.errors import RecipeError

GIB = 2**30
TILE_TOKENS, TILE_FROM = 16384, 65536
"""What `tile_tokens: auto` stands for, and for how many tokens of a process; see
`extend.train.memory.layers`."""

Trained = Literal["all", "lora", "lora+", "norms"]
"""lora+: adapters, norms and embeddings; norms: norms and embeddings without adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """GPUs of one kind, evenly over hosts.

    Attributes:
        gpu: its kind, a key of `extend.capacity.rates.GPUS`.
        num_gpus: of all hosts together.
        gpu_memory_bytes, host_memory_bytes: of one GPU, and of one host.
    """

    gpu: str = "h200"
    num_gpus: int = 1
    hosts: int = 1
    gpu_memory_bytes: int = 139 * GIB
    host_memory_bytes: int = 0

    def __post_init__(self) -> None:
        if self.num_gpus < 1 or self.hosts < 1 or self.num_gpus % self.hosts:
            raise RecipeError(f"a machine of {self.num_gpus} GPUs in {self.hosts} hosts: give as "
                              "many GPUs for every host, and at least one")

    @property
    def gpus_per_host(self) -> int:
        return self.num_gpus // self.hosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How the rows of a step are dealt out, and what layers keep.

    Attributes:
        length: tokens of a row.
        batch_rows: rows of an optimizer step, over all processes.
        dp, cp, tp: groups of rows, processes that share a row's tokens, and processes that share
            the same tokens' heads and channels.
        replicas: copies of the sharded parameters (hybrid sharding); each is spread over
            dp * cp / replicas processes.
        micro_rows: rows that a process computes at once.
        recomputed: layers, from the first on, that keep their input and are computed again.
        kept_attention: of those, layers that keep what attention gave.
        host_bytes: of a host, for what layers keep.
        hosts: that the processes are spread over evenly.
        kept_form: "exact", or "fp8" for inputs in 8 bits.
        tile: tokens that MLPs and norms take at a time; None: all.
        compiled: norms, MLPs and projections are compiled.
        weight_bytes: of a trained parameter and of its moments; layers compute in 2 bytes.
        optimizer: "adamw", "adamw-8bit" or "adamw-offload".
        loss_chunk: tokens whose logits exist at once.
        teacher: whether a model that rows are distilled from is held beside the trained one.
        distilled: share of the rows that it reads too. taught_length: tokens of these that it reads
            at once, at most.
    """

    length: int
    batch_rows: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    replicas: int = 1
    hosts: int = 1
    micro_rows: int = 1
    recomputed: int
    kept_attention: int = 10**9
    host_bytes: int = 0
    kept_form: Literal["exact", "fp8"] = "exact"
    tile: int | None = None
    compiled: bool = True
    weight_bytes: int = 2
    trained: Trained = "all"
    lora_rank: int = 32
    optimizer: Literal["adamw", "adamw-8bit", "adamw-offload"] = "adamw"
    loss_chunk: int = 4096
    teacher: bool = False
    distilled: float = 0.0
    taught_length: int = 0
    strategy: str = "auto"

    @property
    def world(self) -> int:
        return self.dp * self.cp * self.tp

    @property
    def shards(self) -> int:
        """Processes that share one copy of the parameters, beside tensor parallelism."""
        return self.dp * self.cp // self.replicas

    @property
    def tokens(self) -> int:
        """Of one process at once."""
        return self.micro_rows * self.length // self.cp

    @property
    def micro_steps(self) -> int:
        """Forward and backward passes of an optimizer step."""
        return -(-self.batch_rows // (self.dp * self.micro_rows))

    @property
    def host_share_bytes(self) -> int:
        """Of one process."""
        return self.host_bytes // max(1, self.world // self.hosts)

    @property
    def used_tile(self) -> int | None:
        """The tile if there are more tokens than that."""
        tokens = self.length // self.cp
        return self.tile if self.tile is not None and tokens > self.tile else None

    def with_recomputed(self, layers: int) -> "Setup":
        return replace(self, recomputed=layers)


def auto_tile(local_len: int) -> int | None:
    """What `tile_tokens: auto` makes of a process's tokens of a row."""
    return TILE_TOKENS if local_len > TILE_FROM else None
