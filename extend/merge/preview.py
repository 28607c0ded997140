"""What a merge would write and everything that stands against it, from headers and configs alone.

No weight is read. So what only values tell is not seen here: NaN, overflow, a stored `lm_head`
that differs from the embedding it should repeat.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from extend.adapter_format.peft_files import Adapter, stored_dtype
from extend.adapter_format.sidecar import HEAD_NAME, RopeChange, parameter_infos, tied_copy
from extend.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo, dtype_name
from extend.errors import CompatibilityError, ExtendError, RecipeError
from extend.merge.compat import context_change, dtype_problems, fit_problems
from extend.model_config import ModelConfig, read_config
from extend.output import require_new, require_space

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Preview:
    """The outcome of a dry run.

    Attributes:
        problems: one line each, empty when the merge can be done.
        tensors: what the output's weights would be; empty when the target cannot be read.
        modules: how many of them get a LoRA product.
        sidecar_tensors: how many get a delta of the sidecar.
        dropped_buffers: tensors of the target that would not be written.
        change: RoPE and lengths that would be written, None when they are not known.
    """

    problems: tuple[str, ...]
    tensors: tuple[TensorInfo, ...] = ()
    modules: int = 0
    sidecar_tensors: int = 0
    dropped_buffers: tuple[str, ...] = ()
    change: RopeChange | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights, without headers and side files."""
        return sum(info.num_bytes for info in self.tensors)

    def text(self) -> str:
        """What would be written, in one line."""
        line = (f"would write {len(self.tensors)} tensors ({self.num_bytes:,} bytes), "
                f"{self.modules} with a LoRA product and {self.sidecar_tensors} with a sidecar "
                "delta")
        if self.dropped_buffers:
            line += f"; would drop {len(self.dropped_buffers)} derived buffers"
        if self.change is not None:
            line += (f"; rope_theta {self.change.after['rope_theta']:g}, context "
                     f"{self.change.max_position_embeddings_after} tokens")
        return line

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {"problems": list(self.problems), "tensors": len(self.tensors),
                "num_bytes": self.num_bytes, "modules": self.modules,
                "sidecar_tensors": self.sidecar_tensors,
                "dropped_buffers": list(self.dropped_buffers)}

    def raise_if_any(self) -> None:
        """Raise CompatibilityError with every problem, one a line."""
        if self.problems:
            count = len(self.problems)
            lines = "\n".join(f"  {number}. {problem}"
                              for number, problem in enumerate(self.problems, start=1))
            raise CompatibilityError(f"the merge has {count} problem{'s' * (count > 1)}:\n{lines}"
                                     f"\n{self.text()}")


def preview(adapter: Path | str, target: Path | str, out: Path | str, *, weight: float = 1.0,
            sidecar: bool = True, dtype: str | None = None, rope_from: Path | str | None = None,
            overwrite: bool = False) -> Preview:
    """Check a merge without reading a weight or writing a byte; the arguments are `merge`'s.

    A problem does not hide another: whatever can still be checked is.
    """
    problems: list[str] = []

    def attempt(step: Callable[[], _T]) -> _T | None:
        try:
            return step()
        except ExtendError as error:
            problems.append(str(error))
            return None

    attempt(lambda: check_weight(weight))
    out_dtype = attempt(lambda: out_dtype_name(dtype))
    lora = attempt(lambda: Adapter(adapter))
    config, files = attempt(lambda: read_config(target)), attempt(lambda: Checkpoint(target))
    change = None
    if lora is not None and config is not None:
        change = attempt(lambda: context_change(lora, config, rope_from))
    infos = {} if files is None else files.infos
    written: list[TensorInfo] = []
    if files is not None and config is not None:
        infos = parameter_infos(config, files, headers_only=True)
        written = announce(files, infos, out_dtype, tied_copy(config, files, headers_only=True))
    problems += _misfits(lora, config, infos, Path(target))
    attempt(lambda: require_new(out, overwrite=overwrite))
    attempt(lambda: _require_room(Path(out), written))
    side = lora.sidecar.tensors if lora is not None and lora.sidecar and sidecar and weight else ()
    dropped = sorted(set(files.infos) - {i.name for i in written}) if files and written else ()
    return Preview(tuple(problems), tuple(written), len(lora.modules) if lora and weight else 0,
                   len(side), tuple(dropped), change)


def _misfits(lora: Adapter | None, config: ModelConfig | None, infos: dict[str, TensorInfo],
             target: Path) -> list[str]:
    if lora is None or config is None:
        return [f"{target}: {line}" for line in dtype_problems(infos)]
    return [f"{lora.directory} on {target}: {line}" for line in fit_problems(lora, config, infos)] \
        if infos else []


def _require_room(out: Path, written: Sequence[TensorInfo]) -> None:
    """Raise CheckpointError when the disk that `out` will lie on cannot hold the weights."""
    parent = next(p for p in out.absolute().parents if p.exists())
    require_space(parent, sum(info.num_bytes for info in written))


def check_weight(weight: float) -> None:
    """Raise RecipeError when a weight is not a finite number."""
    if not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise RecipeError(f"weight is {weight!r}; give a finite number")


def out_dtype_name(dtype: str | None) -> str | None:
    """The safetensors name of the output's dtype; None keeps each tensor's own."""
    return None if dtype is None else dtype_name(stored_dtype(dtype))


def announce(files: Checkpoint, infos: dict[str, TensorInfo], out_dtype: str | None,
             head: str | None) -> list[TensorInfo]:
    """The tensors to write, in the target's order.

    Args:
        infos: the target's parameters; what is not among them (derived buffers) is left out.
        out_dtype: safetensors name for floating-point tensors, or None.
        head: the embedding that a stored `lm_head.weight` repeats, or None.
    """
    kept = [files.infos[name] for name in files.infos
            if name in infos or (name == HEAD_NAME and head)]
    return [info if out_dtype is None or info.dtype not in FLOAT_DTYPES
            else info._replace(dtype=out_dtype) for info in kept]
