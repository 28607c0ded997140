"""Which parameters share one weight of a merge."""

from collections.abc import Callable

from extend.delta.pair import is_vocabulary, layer_of


def by_layer(name: str) -> str:
    """One group a decoder layer; what lies outside the layers is a group of its own."""
    layer = layer_of(name)
    return _outside(name) if layer is None else f"layers.{layer}"


def by_kind(name: str) -> str:
    """Attention, MLP and norms of each decoder layer."""
    layer = layer_of(name)
    if layer is None:
        return _outside(name)
    module = name.rpartition(".")[0]
    if "norm" in module.rpartition(".")[2]:  # q_norm and k_norm as well
        return f"layers.{layer}.norms"
    return f"layers.{layer}.{'attention' if 'attn' in module else 'mlp'}"


def by_module(name: str) -> str:
    """One group a module: a weight and its bias."""
    return name.rpartition(".")[0]


def _outside(name: str) -> str:
    return "vocabulary" if is_vocabulary(name) else by_module(name)


GROUPS: dict[str, Callable[[str], str]] = {
    "kind": by_kind, "layer": by_layer, "module": by_module}
