"""What strategies share that save tensors of their own rank alone: (q, k, v, out, lse)."""

from torch import Tensor


class SavesLocal:
    """Keeps out and lse; q, k and v are at hand again when attention is resumed."""

    def kept(self, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return saved[3:]

    def resume(
        self, q: Tensor, k: Tensor, v: Tensor, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return kept[0], (q, k, v, *kept)
