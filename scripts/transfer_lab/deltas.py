"""What can be done to a delta before it is added: cut, split, shuffled, folded, fitted to another.

A delta is a mapping of parameter names to fp32 tensors; nothing here changes its arguments.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from extend.delta.noise import rounding_noise
from extend.delta.pair import layer_of
from extend.delta.svd import (
    Factors,
    factorize_to_edge,
    factorize_to_rank,
    tensor_generator,
)

Delta = Mapping[str, Tensor]
NORM_READERS = {
    "input_layernorm.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm.weight": ("mlp.gate_proj", "mlp.up_proj")}
"""Norms of a Llama layer, and the linear layers that read what they scale."""


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether LoRA factors can hold it: a 2-D weight of a decoder layer."""
    return tensor.ndim == 2 and layer_of(name) is not None


def matrices(delta: Delta) -> dict[str, Tensor]:
    return {name: d for name, d in delta.items() if is_matrix(name, d)}


def select(delta: Delta, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    return {name: d for name, d in delta.items() if wanted(name)}


def norms(delta: Delta) -> dict[str, Tensor]:
    return {name: d for name, d in delta.items() if d.ndim == 1}


def in_third(name: str, third: int, num_layers: int) -> bool:
    """Whether a parameter lies in that third of the layers, counted from 0."""
    layer = layer_of(name)
    return layer is not None and layer * 3 // num_layers == third


def norm(delta: Delta) -> float:
    """Frobenius norm over all tensors."""
    return math.sqrt(math.fsum(float(d.double().square().sum()) for d in delta.values()))


# ---- low rank -----------------------------------------------------------------------------------

def factorize(delta: Delta, rank: int) -> dict[str, Factors]:
    """Factors of every matrix, from which smaller ranks are slices."""
    return {name: factorize_to_rank(d, rank, tensor_generator(name, 0))
            for name, d in matrices(delta).items()}


def factorize_above_noise(base: Delta, delta: Delta, limit: int) -> dict[str, Factors]:
    """Factors of what stands out of the rounding of a tuned checkpoint stored in bfloat16.

    Both checkpoints are taken as stored in bfloat16; `limit` caps the rank.
    """
    found = {}
    for name, d in matrices(delta).items():
        stored = base[name].bfloat16()
        tuned = (base[name] + d).bfloat16()
        seen = tuned.float() - stored.float()
        edge = rounding_noise(stored, tuned, "BF16").edge
        if bool(seen.any()):
            found[name] = factorize_to_edge(seen, edge, limit, tensor_generator(name, 0))
    return found


def cut(factors: Mapping[str, Factors], rank: int | None = None) -> dict[str, Tensor]:
    """The matrices that the leading ranks make; all of them unless `rank` is given."""
    parts = {name: f if rank is None else f.cut(rank) for name, f in factors.items()}
    return {name: f.lora_b @ f.lora_a for name, f in parts.items()}


def size_of(factors: Mapping[str, Factors], rank: int | None = None) -> dict[str, float]:
    """Mean rank, bytes of the factors in bfloat16, and the relative residual over all matrices."""
    ranks, num_bytes, held, total = [], 0, 0.0, 0.0
    for f in factors.values():
        part = f if rank is None else f.cut(rank)
        ranks.append(len(part.values))
        num_bytes += 2 * (part.lora_a.numel() + part.lora_b.numel())
        held += float(part.values.double().square().sum())
        total += f.total
    return {"mean_rank": sum(ranks) / len(ranks), "adapter_bytes": num_bytes,
            "residual": math.sqrt(max(0.0, 1 - held / total))}


# ---- controls -----------------------------------------------------------------------------------

def random_like(delta: Delta, seed: int) -> dict[str, Tensor]:
    """Gaussian noise in place of every tensor, of the same Frobenius norm."""
    noise = {name: torch.randn(d.shape, generator=tensor_generator(name, seed)).to(d.device)
             for name, d in delta.items()}
    return {name: z * (d.norm() / z.norm()) for (name, d), z in zip(delta.items(), noise.values(),
                                                                    strict=True)}


def shuffled(delta: Delta, seed: int) -> dict[str, Tensor]:
    """Every tensor with its rows and columns permuted and their signs drawn at random.

    The singular values, and the sizes of the elements, stay what they are; the directions do not.
    """
    return {name: _signed_shuffle(d, tensor_generator(name, seed)) for name, d in delta.items()}


def _signed_shuffle(x: Tensor, generator: torch.Generator) -> Tensor:
    for dim, size in enumerate(x.shape):
        order = torch.randperm(size, generator=generator).to(x.device)
        signs = torch.randint(0, 2, (size,), generator=generator).to(x) * 2 - 1
        shape = [1] * x.ndim
        shape[dim] = size
        x = x.index_select(dim, order) * signs.view(shape)
    return x


# ---- norms --------------------------------------------------------------------------------------

def fold_norms(base: Delta, delta: Delta) -> dict[str, Tensor]:
    """The matrices of a delta that also do what its norms of the layers do.

    W' diag(n') = (W' diag(n' / n)) diag(n), so with norms left as the base's the linear layers that
    read them become W' diag(n' / n). The last norm is read by the head, which is not folded into.
    """
    folded = matrices(delta)
    for name, change in norms(delta).items():
        layer = layer_of(name)
        if layer is None:
            continue
        prefix, _, own = name.partition(f"layers.{layer}.")
        for module in NORM_READERS[own]:
            weight = f"{prefix}layers.{layer}.{module}.weight"
            ratio = change / base[name]
            own_delta = folded.get(weight, torch.zeros_like(base[weight]))
            folded[weight] = own_delta + (base[weight] + own_delta) * ratio
    return folded


# ---- two deltas ---------------------------------------------------------------------------------

def cosine(a: Delta, b: Delta) -> float:
    """Of two deltas as vectors, over the matrices that both have."""
    names = matrices(a).keys() & matrices(b).keys()
    dot = math.fsum(float((a[n].double() * b[n].double()).sum()) for n in names)
    sizes = norm({n: a[n] for n in names}) * norm({n: b[n] for n in names})
    return dot / sizes if sizes else 0.0


class Subspaces:
    """Leading singular vectors of every matrix of a delta.

    Attributes:
        left, right: name -> [out, r] and [in, r], orthonormal columns, falling singular values.
    """

    def __init__(self, factors: Mapping[str, Factors]):
        self.left = {n: torch.linalg.qr(f.lora_b).Q for n, f in factors.items()}
        self.right = {n: torch.linalg.qr(f.lora_a.T).Q for n, f in factors.items()}

    def overlap(self, other: "Subspaces", rank: int) -> dict[str, float]:
        """Mean over matrices of ||U^T V||_F^2 / rank, left and right; 1 for the same subspace.

        `chance` is what random subspaces give.
        """
        found = {}
        for side in ("left", "right"):
            ours, theirs = getattr(self, side), getattr(other, side)
            shared = [float((ours[n][:, :rank].T @ theirs[n][:, :rank]).square().sum()) / rank
                      for n in ours.keys() & theirs.keys()]
            chance = [rank / len(ours[n]) for n in ours.keys() & theirs.keys()]
            found[f"overlap_{side}"] = sum(shared) / len(shared)
            found[f"chance_{side}"] = sum(chance) / len(chance)
        return found

    def remove_from(self, delta: Delta, rank: int, side: str) -> dict[str, Tensor]:
        """The delta without what lies in the leading subspaces: `left`, `right`, or `both` of them.

        The same as `extend.merge.methods.Orthogonal`, with the decomposition done once.
        """
        return {name: self._remove(name, d, rank, side) if name in self.left else d
                for name, d in delta.items()}

    def _remove(self, name: str, d: Tensor, rank: int, side: str) -> Tensor:
        if side != "right":
            u = self.left[name][:, :rank]
            d = d - u @ (u.T @ d)
        if side != "left":
            v = self.right[name][:, :rank]
            d = d - (d @ v) @ v.T
        return d


def ties(deltas: Sequence[Delta], density: float) -> dict[str, Tensor]:
    """Sum of deltas by trim and elect: the small elements and those against the majority are 0.

    Source: Yadav et al. 2023, arXiv:2306.01708; a sum in place of the mean, as mergekit's `ties`
    with `normalize: false`.
    """
    merged = {}
    for name in set().union(*deltas):
        parts = torch.stack([trim(d[name], density) for d in deltas if name in d])
        agrees = parts.sign() == parts.sum(0).sign()
        merged[name] = (parts * agrees).sum(0)
    return merged


def trim(x: Tensor, density: float) -> Tensor:
    """Only the largest elements of a tensor, this share of them."""
    count = max(1, round(density * x.numel()))
    kept = torch.zeros_like(x).flatten()
    largest = x.abs().flatten().topk(count).indices
    kept[largest] = x.flatten()[largest]
    return kept.view_as(x)


def dare(delta: Delta, density: float, seed: int) -> dict[str, Tensor]:
    """Elements dropped at random, the others enlarged so that the expectation stays.

    Source: Yu et al. 2023, arXiv:2311.03099.
    """
    return {name: d * (torch.rand(d.shape, generator=tensor_generator(name, seed)) < density)
            .to(d.device) / density for name, d in delta.items()}
