"""A transformers model on several ranks that share each row."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from extend.evaluate.backends.backend import AnswerScore, Generation
from extend.evaluate.forward import check_head, read_head
from extend.evaluate.generate import end_tokens, finish
from extend.evaluate.load import load_model
from extend.evaluate.ring_attention import register_ring_prefill
from extend.evaluate.ring_reader import RingReader
from extend.evaluate.shards import GROWTH
from extend.evaluate.tasks.task import Prompt
from extend.ring.agreement import agree
from extend.ring.comm import RingComm
from extend.tokenizer import load_tokenizer


class RingBackend:
    """A loaded model and its tokenizer on each of the ranks; all of them make the same calls.

    Every rank has all weights, computes its part of each row's tokens and keeps the keys and
    values of these. Results are the same on all ranks.

    Args:
        model: its attention is replaced.
        group: the ranks that share each row; None is the default group, or this process alone.
        chunk: most tokens of one rank in one forward; a longer row is read in parts.
    """

    name = "ring"

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *,
                 group: ProcessGroup | None = None, chunk: int):
        model.set_attn_implementation(register_ring_prefill())
        self.model, self.tokenizer, self.chunk = model, tokenizer, chunk
        self.comm = RingComm(group)
        self._references: dict[Path, RingBackend] = {}

    @property
    def device(self) -> torch.device:
        return self.model.device

    def reader(self, tokens: int = 0, asked: int = 0) -> RingReader:
        """A new row, with room for so many tokens to be read and to be asked on top."""
        return RingReader(self.model, self.comm, chunk=self.chunk, tokens=tokens, asked=asked)

    def new_cache(self, room: int) -> RingReader:
        """A new row of at most `room` tokens, to ask questions after.

        Raises:
            CompatibilityError: the RoPE changes with the length.
        """
        reader = self.reader(room, asked=GROWTH)
        reader.refuse_growing_rope("read in parts")
        return reader

    @torch.inference_mode()
    def hidden_parts(self, ids: Sequence[int],
                     cache: RingReader) -> Iterator[tuple[Tensor, Tensor]]:
        """Read what follows in a row; see `RingReader.read`."""
        yield from cache.read(ids)

    @torch.inference_mode()
    def score_after(self, cache: RingReader, prompts: Sequence[Prompt]) -> list[AnswerScore]:
        """Score answers that each follow the row read so far, which stays as it is.

        Raises:
            CompatibilityError, RankError: as `score`.
        """
        self._check([prompt.ids for prompt in prompts])
        scores, length = [], cache.length
        for prompt in prompts:
            hidden = cache.ask(prompt.ids)
            cache.truncate(length)
            choices, losses = read_head(self.model, hidden[-prompt.answer_len - 1:-1],
                                        prompt.ids[-prompt.answer_len:])
            scores.append(_score(prompt, *self._agreed(torch.stack((choices.double(),
                                                                    losses.double())))))
        return scores

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt]) -> list[AnswerScore]:
        """Score answers by teacher forcing; short rows lie side by side in one forward.

        Raises:
            CompatibilityError: the model changes its logits after the output head, its RoPE
                changes with the length, or the ranks were given different rows.
            RankError: a rank does not take part.
        """
        self._check([prompt.ids for prompt in prompts])
        scores: dict[int, AnswerScore] = {}
        for batch in self._batches([prompt.ids for prompt in prompts]):
            rows = [prompts[i] for i in batch]
            choices, losses = self._read_answers([row.ids for row in rows],
                                                 [row.answer_len for row in rows])
            lengths = [row.answer_len for row in rows]
            scores.update(zip(batch, map(_score, rows, choices.split(lengths),
                                         losses.split(lengths)), strict=True))
        return [scores[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def token_losses(self, rows: Sequence[Sequence[int]],
                     last: Sequence[int] | None = None) -> list[np.ndarray]:
        """Of each row the loss of every token but the first, fp32 [len - 1], in nats.

        Args:
            last: of each row, how many of its last tokens are scored instead.

        Raises:
            CompatibilityError, RankError: as `score`.
        """
        self._check(rows)
        counts = [len(row) - 1 for row in rows] if last is None else last
        found: dict[int, np.ndarray] = {}
        for batch in self._batches(rows):
            lengths = [counts[i] for i in batch]
            _, losses = self._read_answers([rows[i] for i in batch], lengths)
            found.update(zip(batch, (some.float().numpy() for some in losses.split(lengths)),
                             strict=True))
        return [found[i] for i in range(len(rows))]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Let the model write its first choices after each prompt, one prompt after the other.

        Raises:
            CompatibilityError, RankError: as `score`.
        """
        self._check([prompt.ids for prompt in prompts])
        ends = end_tokens(self.model, self.tokenizer)
        return [finish(self.tokenizer, prompt, self._write(prompt, ends), ends)
                for prompt in prompts]

    def reference(self, path: Path | str) -> "RingBackend":
        """Another model on the same ranks and in the same dtype, loaded once and kept.

        Raises:
            CheckpointError: damaged weights, or names that do not fit the architecture.
        """
        path = Path(path).absolute()
        if path not in self._references:
            self._references[path] = RingBackend(
                load_model(path, device=self.device, dtype=self.model.dtype),
                load_tokenizer(path), group=self.comm.group, chunk=self.chunk)
        return self._references[path]

    def _check(self, rows: Sequence[Sequence[int]]) -> None:
        """Refuse a model of another head, and rows that are not the same on every rank."""
        check_head(self.model)
        digest = hashlib.sha256()
        for row in rows:
            digest.update(np.asarray(row, dtype=np.int64).tobytes() + b".")
        agree(self.comm, "evaluation", rows=len(rows), sha256_of_ids=digest.hexdigest()[:16])

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices of rows, shortest first, that lie side by side in one forward of all ranks."""
        batch, tokens = [], 0
        for i in sorted(range(len(rows)), key=lambda i: (len(rows[i]), i)):
            if batch and tokens + len(rows[i]) > self.chunk * self.comm.world:
                yield batch
                batch, tokens = [], 0
            batch.append(i)
            tokens += len(rows[i])
        if batch:
            yield batch

    def _read_answers(self, rows: Sequence[Sequence[int]],
                      lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """First choices int64 and losses fp64 of the last `lengths` tokens of each row, on the CPU.

        All rows are read in one forward, or one row in parts. A rank computes the logits that
        predict tokens whose predecessor it holds.
        """
        ends = list(accumulate(len(row) for row in rows))
        ids = torch.cat([torch.as_tensor(row, dtype=torch.int64) for row in rows])
        asked = torch.cat([torch.arange(end - 1 - n, end - 1)
                           for end, n in zip(ends, lengths, strict=True)])
        found = torch.zeros(2, len(asked), dtype=torch.float64, device=self.device)
        starts = (0, *ends[:-1]) if len(rows) > 1 else ()
        for positions, hidden in self.reader().read(ids, starts=starts, last=True):
            slots = torch.isin(asked, positions).nonzero().flatten()
            if len(slots):
                states = hidden[torch.searchsorted(positions, asked[slots]).to(hidden.device)]
                choices, losses = read_head(self.model, states, ids[asked[slots] + 1])
                found[:, slots.to(self.device)] = torch.stack((choices.double(), losses.double()))
        choices, losses = self._sum(found).cpu()
        return choices.long(), losses

    def _write(self, prompt: Prompt, ends: frozenset[int]) -> list[int]:
        """What follows a prompt, up to its budget or an end token."""
        reader, written = self.reader(len(prompt.ids), prompt.max_new_tokens), []
        token = torch.zeros(1, dtype=torch.int64, device=self.device)
        for positions, hidden in reader.read(prompt.ids):
            if len(positions) and positions[-1] == len(prompt.ids) - 1:
                token += self._choose(hidden[-1:])
        written.append(int(self._sum(token)))
        while written[-1] not in ends and len(written) < prompt.max_new_tokens:
            written.append(int(self._agreed(self._choose(reader.ask(written[-1:])))))
        return written

    def _choose(self, hidden: Tensor) -> Tensor:
        """First choices [n] after hidden states [n, hidden_size]."""
        return self.model.get_output_embeddings()(hidden).float().argmax(dim=-1)

    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, of which one has what the others have not."""
        if self.comm.world > 1:
            dist.all_reduce(tensor, group=self.comm.group)
        return tensor

    def _agreed(self, tensor: Tensor) -> Tensor:
        """The first rank's: GPUs that rounded differently would otherwise part ways."""
        if self.comm.world > 1:
            dist.broadcast(tensor, self.comm.ranks[0], group=self.comm.group)
        return tensor


def _score(prompt: Prompt, choices: Tensor, losses: Tensor) -> AnswerScore:
    """Of the first choices and losses, whole numbers and fp64 [answer_len], at the answer."""
    predicted = choices.long().tolist()
    return AnswerScore(predicted, predicted == list(prompt.ids[-prompt.answer_len:]),
                       float(losses.sum()))
