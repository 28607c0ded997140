"""What bench_eval.py times on a model: the grid, a long prefill, generation."""

import resource
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from extend.evaluate.attention import register_prefill_attention
from extend.evaluate.backends.local import LocalBackend
from extend.evaluate.frame import Frame
from extend.evaluate.load import choose_chunk, load_model
from extend.evaluate.measures import MEASURES
from extend.evaluate.plan import spread_depths
from extend.evaluate.tasks import TASKS, Cell, Prompt
from extend.loading import choose_device, choose_dtype
from extend.ring.kernels import choose_kernel
from extend.ring.mask import make_mask
from extend.ring.tiles import Run, fit_tiles, plan_tiles
from extend.tokenizer import load_tokenizer

GIB = 2**30
NEW_TOKENS = 64
_REPEATS = 3  # of each call of the floor; the least time counts


class Bench:
    """A loaded model and the options of the command line."""

    def __init__(self, options: Namespace):
        self.options = options
        device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, device)
        tokenizer = load_tokenizer(options.model)
        has_weights = any(options.model.glob("*.safetensors"))
        self.weights = "from the checkpoint" if has_weights else "random"
        if has_weights:
            model = load_model(options.model, device=device, dtype=dtype)
        else:
            model = random_model(options, device, dtype)
        self.backend = LocalBackend(model, tokenizer, chunk=choose_chunk(options.chunk, device))
        self.frame = Frame.of(tokenizer)
        self.is_cuda = device.type == "cuda"
        self.device_name = torch.cuda.get_device_name(device) if self.is_cuda else "CPU"

    def sync(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.backend.device)

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that `work` takes, and what it returns."""
        self.sync()
        start = time.perf_counter()
        found = work()
        self.sync()
        return time.perf_counter() - start, found

    def reset_peak(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.backend.device)

    def peak_gib(self) -> dict[str, float]:
        """Of the GPU since `reset_peak`; of the process since it began on a CPU."""
        if not self.is_cuda:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return {"process": round(peak / GIB, 2)}
        device = self.backend.device
        return {"allocated": round(torch.cuda.max_memory_allocated(device) / GIB, 2),
                "reserved": round(torch.cuda.max_memory_reserved(device) / GIB, 2)}

    # ------------------------------------------------------------------------------------- grid

    def grid(self) -> dict[str, Any]:
        options = self.options
        lengths = [options.longest * (i + 1) // options.lengths for i in range(options.lengths)]
        depths = spread_depths(options.depths, "depths")
        self._warm_up(lengths[0])
        self.reset_peak()
        cold, cells, rows = self._stream(lengths, depths)
        peak = self.peak_gib()
        warm, _, _ = self._stream(lengths, depths)
        found = {"lengths": lengths, "depths": depths, "cells": len(cells),
                 "stream_seconds": round(cold, 3), "stream_again_seconds": round(warm, 3),
                 "stream_peak_gib": peak, "stream_score": mean([row["score"] for row in rows]),
                 "facts_in_view": max(row["facts_in_view"] for row in rows),
                 "stream_parts": self._parts(lengths, depths),
                 "against_one_forward": self._compare(lengths, depths, rows)}  # fmt: skip
        found |= self._cell_by_cell(lengths, depths)
        found["ratio"] = round(found["cells_seconds"] / cold, 2)
        found["ratio_again"] = round(found["cells_seconds"] / warm, 2)
        return found

    def _warm_up(self, length: int) -> None:
        """Choose kernels and start libraries; no length of the grid is read."""
        length = max(length * 3 // 4, 1200 if self.options.tiny else 2048)
        self._stream([length - 64, length], [0.5])
        cells = TASKS["passkey"](controls=False).cells("warm", [length], [0.5], 1)
        MEASURES["exact"](self.backend, self.frame, TASKS["passkey"](), cells, 0)

    def _stream(self, lengths: Sequence[int], depths: Sequence[float],
                backend: Any = None) -> tuple[float, list[Cell], list[dict[str, Any]]]:
        def work() -> tuple[list[Cell], list[dict[str, Any]]]:
            task = TASKS["passkey-stream"](controls=False, spot_checks=None)
            cells = task.cells("stream", lengths, depths, 1)
            return cells, MEASURES["stream"](backend or self.backend, self.frame, task, cells,
                                             self.options.seed)  # fmt: skip

        seconds, (cells, rows) = self.timed(work)
        return seconds, cells, rows

    def _parts(self, lengths: Sequence[int], depths: Sequence[float]) -> dict[str, float]:
        """Seconds of reading, of asking, and of all else (building prompts, rows)."""
        clock = Clock(self)
        total, _, _ = self._stream(lengths, depths, clock)
        spent = {name: round(seconds, 3) for name, seconds in clock.seconds.items()}
        return {**spent, "else": round(total - sum(clock.seconds.values()), 3)}

    def _compare(self, lengths: Sequence[int], depths: Sequence[float],
                 rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The stream's answers beside those of one forward of each prompt, for three cells."""
        task = TASKS["passkey-stream"](controls=False, spot_checks=None)
        cells = task.cells("stream", lengths, depths, 1)
        chosen = sorted({0, len(cells) // 2, len(cells) - 1})
        differences, same = [], 0
        for i in chosen:
            (prompt,) = task.prompts(self.frame, cells[i], self.options.seed)
            (score,) = self.backend.score([prompt])
            differences.append(abs(score.nll / prompt.answer_len - rows[i]["answer_loss"]))
            predicted = self.frame.tokenizer.decode(score.predicted)
            same += predicted == rows[i]["trials"][0]["predicted"]
        return {"cells": len(chosen), "same_answers": same,
                "largest_loss_difference": float(f"{max(differences):.3g}")}

    def _cell_by_cell(self, lengths: Sequence[int], depths: Sequence[float]) -> dict[str, Any]:
        """A round is one depth of all lengths; depths differ in nothing that takes time."""
        seconds, scores, begin = [], [], time.perf_counter()
        for depth in depths:
            spent = time.perf_counter() - begin
            if seconds and spent + spent / len(seconds) > self.options.grid_seconds:
                break
            rounds = 0.0
            for length in lengths:
                took, row = self.timed(lambda at=(length, depth): self._cell(*at))
                rounds += took
                scores.append(row["score"])
            seconds.append(rounds)
        return {"cells_seconds": round(mean(seconds) * len(depths), 3),
                "cells_timed": len(scores), "cells_score": mean(scores),
                "cells_scaled": len(seconds) < len(depths)}

    def _cell(self, length: int, depth: float) -> dict[str, Any]:
        task = TASKS["passkey"](controls=False)
        cells = task.cells("passkey", [length], [depth], 1)
        return MEASURES["exact"](self.backend, self.frame, task, cells, self.options.seed)[0]

    # ---------------------------------------------------------------------------------- prefill

    def prefill(self) -> dict[str, Any]:
        total, chunk = self.options.prefill, self.backend.chunk
        size = -(-total // -(-total // chunk))
        parts = [(begin, min(begin + size, total)) for begin in range(0, total, size)]
        self.reset_peak()
        floor = self._floor(parts)
        vocabulary = self.backend.model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (total,), generator=torch.Generator().manual_seed(0))
        for _ in self.backend.hidden_parts(ids[:size], self.backend.new_cache(size)):
            pass  # kernels and libraries are ready
        self.reset_peak()
        seconds, _ = self.timed(lambda: self._read(ids))
        return {"tokens": total, "parts": len(parts), "seconds": round(seconds, 3),
                "attention_floor_seconds": round(floor, 3), "ratio": round(seconds / floor, 3),
                "tokens_per_second": round(total / seconds), "peak_gib": self.peak_gib()}

    def _read(self, ids: torch.Tensor) -> None:
        cache = self.backend.new_cache(len(ids))
        for _ in self.backend.hidden_parts(ids, cache):
            pass

    @torch.inference_mode()
    def _floor(self, parts: Sequence[tuple[int, int]]) -> float:
        """Seconds of the kernels alone, for all layers; each kind of layer is timed once."""
        layers = self.backend.new_cache(1).layers
        windows = [layer.sliding_window if layer.is_sliding else None for layer in layers]
        return sum(windows.count(window) * sum(self._kernels(begin, end, window)
                                               for begin, end in parts)
                   for window in dict.fromkeys(windows))

    def _kernels(self, begin: int, end: int, window: int | None) -> float:
        """Seconds of attention of tokens begin to end to all before them that they see."""
        model, new = self.backend.model, end - begin
        config = model.config.get_text_config()
        total = end if window is None else min(end, new + window - 1)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        q, k, v = (torch.randn(1, rows, count, width, device=model.device, dtype=model.dtype)
                   for rows, count in ((new, heads), (total, kv_heads), (total, kv_heads)))
        q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).contiguous() for t in (k, v))
        mask = make_mask(True, window, None, total)
        kernel = choose_kernel("auto", q, k, mask=mask)
        tiles = fit_tiles(plan_tiles((Run(total - new, 1, new),), (Run(0, 1, total),), mask),
                          bands=kernel.bands, packed=kernel.packed)  # fmt: skip

        def work() -> None:
            for tile in tiles:
                kernel.forward(q[:, :, tile.q], k[:, :, tile.kv], v[:, :, tile.kv],
                               mask=tile.mask, softmax_scale=width**-0.5)  # fmt: skip

        work()  # compiles
        return min(self.timed(work)[0] for _ in range(_REPEATS))

    # --------------------------------------------------------------------------------- generate

    def generate(self) -> dict[str, Any]:
        longest, rows = self.options.longest, self.options.rows
        lengths = [longest >> shift for shift in range(5, -1, -1)
                   if longest >> shift >= 2 * NEW_TOKENS]
        vocabulary = self.backend.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        found = {}
        self.reset_peak()
        for length in lengths:
            room = length - NEW_TOKENS
            ids = torch.randint(vocabulary, (rows, room), generator=generator).tolist()
            prompts = [Prompt(row, 0, {}, NEW_TOKENS) for row in ids]
            seconds, written = self.timed(lambda some=prompts: self.backend.generate(some))
            found[str(length)] = {"seconds": round(seconds, 3),
                                  "new_tokens": sum(len(g.ids) for g in written)}
        return {"rows": rows, "new_tokens_at_most": NEW_TOKENS, "lengths": found,
                "peak_gib": self.peak_gib()}


class Clock:
    """A backend whose reading and asking are timed apart, with a wait after each."""

    def __init__(self, bench: Bench):
        self.name, self._bench = "local", bench
        self.new_cache = bench.backend.new_cache
        self.seconds = {"read": 0.0, "ask": 0.0}

    def hidden_parts(self, ids: Any, cache: Any) -> list[Any]:
        seconds, _ = self._bench.timed(
            lambda: [None for _ in self._bench.backend.hidden_parts(ids, cache)])
        self.seconds["read"] += seconds
        return []

    def score_after(self, cache: Any, prompts: Sequence[Prompt]) -> list[Any]:
        seconds, scores = self._bench.timed(
            lambda: self._bench.backend.score_after(cache, prompts))
        self.seconds["ask"] += seconds
        return scores


def random_model(options: Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    """The architecture of a config.json with random weights."""
    torch.manual_seed(options.seed)
    config = AutoConfig.from_pretrained(str(options.model), local_files_only=True)
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=register_prefill_attention())
    return model.to(device).eval()


def mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)
