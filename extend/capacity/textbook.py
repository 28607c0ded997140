"""The textbook's memory of one layer under tensor and under sequence parallelism, and where the
two cross.

Numbers are values, not bytes, as in the sources: B rows, L tokens, H hidden width, I inner width
of the MLP, A channels of a head, Z heads, N devices. The exact bytes of a step of this toolkit are
counted in `extend.capacity.activations`; these say when a row is better cut by tokens than by
heads.

Tensor parallelism divides the weights by N, but holds some activations of the hidden width whole
on every device; sequence parallelism divides every activation, but holds the weights whole. All
else is the same in both, so for any N the two cross where `states * weights` equals
`whole * B * L * H`.
How many activations are `whole` is where accounts differ:

    whole  attention of Llama-2      MLP of Llama-2 (SwiGLU, I = 2.6875 H)
    1      16 H   (Li et al.)        32.25 H   the block's output alone
    2       8.0 H                    16.1 H    the norm's input and its output, which a device needs
                                               whole for its backward (the `10` of Korthikanti et
                                               al., eq. 2, without dropout: 4 bytes a block)

The rule of thumb "sequence parallel from 8.1 D in attention and from 16 D in the MLP" is the second
line; the first line's 16 H and 32 H are those of the source's own table, whose MLP has two matrices
of width 4 H. (8.1 H is also, to the digit, the MLP with four whole activations: 32.25 / 4.)

Source: Li et al., Sequence Parallelism, arXiv:2105.13120, tables 1 and 2; Korthikanti et al.,
arXiv:2205.05198, section 4.
"""

from dataclasses import dataclass

STATES = 4  # weight, gradient and two moments, of one dtype


@dataclass(frozen=True, slots=True)
class Block:
    """Sizes of a layer as the formulas name them; `num_matrices` of the MLP: 3 where it is gated.
    """

    hidden: int
    num_heads: int
    head_dim: int
    inner: int
    num_matrices: int = 3

    @property
    def attention_weights(self) -> int:
        """Values of the projections of queries, keys, values and out."""
        return 4 * self.num_heads * self.head_dim * self.hidden

    @property
    def mlp_weights(self) -> int:
        return self.num_matrices * self.hidden * self.inner


LLAMA2_7B = Block(4096, 32, 128, 11008)


def attention_memory(block: Block, length: int, devices: int, *, parallel: str, batch: int = 1,
                     whole: int = 1, scores: bool = True) -> float:
    """Values that a device holds for one attention block, `parallel` by "tensor" or "sequence".

    tensor: 16 A Z H / N + 4 B L Z A / N + B Z L^2 / N + whole B L H;
    sequence: 16 A Z H + 4 B Z L A / N + B Z L^2 / N + whole B L H / N.

    Args:
        whole: activations of the hidden width that tensor parallelism does not divide.
        scores: the term with L^2, which a flash kernel never writes.
    """
    tokens = batch * length
    divided = 4 * tokens * block.num_heads * block.head_dim
    divided += scores * batch * block.num_heads * length**2
    return _memory(block, STATES * block.attention_weights, divided, whole * tokens, devices,
                   parallel)


def mlp_memory(block: Block, length: int, devices: int, *, parallel: str, batch: int = 1,
               whole: int = 1) -> float:
    """Values that a device holds for one MLP: its matrices' states, inner and whole activations."""
    tokens = batch * length
    divided = (block.num_matrices - 1) * tokens * block.inner
    return _memory(block, STATES * block.mlp_weights, divided, whole * tokens, devices, parallel)


def _memory(block: Block, states: float, divided: float, whole_tokens: float, devices: int,
            parallel: str) -> float:
    if parallel == "tensor":
        return (states + divided) / devices + whole_tokens * block.hidden
    return states + (divided + whole_tokens * block.hidden) / devices


def attention_crossover(block: Block, *, batch: int = 1, whole: int = 2) -> float:
    """Tokens of a row from which on sequence parallel attention takes less memory."""
    return STATES * block.attention_weights / (whole * batch * block.hidden)


def mlp_crossover(block: Block, *, batch: int = 1, whole: int = 2) -> float:
    """Tokens of a row from which on a sequence parallel MLP takes less memory."""
    return STATES * block.mlp_weights / (whole * batch * block.hidden)
