"""What a merge would write and everything that stands against it, from headers and configs alone.

No weight is read. So what only values tell is not seen here: NaN, overflow, a stored `lm_head`
that differs from the embedding it should repeat.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extend.adapter_format.sidecar import RopeChange
from extend.checkpoint import TensorInfo
from extend.errors import CompatibilityError
from extend.inputs import takes_models
from extend.merge.prepare import Problems, prepare
from extend.merge.request import Paths, Request
from extend.output import require_inputs_outside, require_new, require_space


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
        raw_tensors: how many get the difference of two models.
        vocabulary: how embedding rows would be mapped, one line for each delta that needs it.
    """

    problems: tuple[str, ...]
    tensors: tuple[TensorInfo, ...] = ()
    modules: int = 0
    sidecar_tensors: int = 0
    dropped_buffers: tuple[str, ...] = ()
    change: RopeChange | None = None
    raw_tensors: int = 0
    vocabulary: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights, without headers and side files."""
        return sum(info.num_bytes for info in self.tensors)

    def text(self) -> str:
        """What would be written, in one line."""
        line = (f"would write {len(self.tensors)} tensors ({self.num_bytes:,} bytes), "
                f"{self.modules} with a LoRA product and {self.sidecar_tensors} with a sidecar "
                "delta")
        if self.raw_tensors:
            line += f", {self.raw_tensors} with the difference of two models"
        if self.dropped_buffers:
            line += f"; would drop {len(self.dropped_buffers)} derived buffers"
        if self.change is not None:
            line += (f"; rope_theta {self.change.after['rope_theta']:g}, context "
                     f"{self.change.max_position_embeddings_after} tokens")
        return "; ".join([line, *self.vocabulary])

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {"problems": list(self.problems), "tensors": len(self.tensors),
                "num_bytes": self.num_bytes, "modules": self.modules,
                "sidecar_tensors": self.sidecar_tensors, "raw_tensors": self.raw_tensors,
                "vocabulary": list(self.vocabulary),
                "dropped_buffers": list(self.dropped_buffers)}

    def raise_if_any(self) -> None:
        """Raise CompatibilityError with every problem, one a line."""
        if self.problems:
            count = len(self.problems)
            lines = "\n".join(f"  {number}. {problem}"
                              for number, problem in enumerate(self.problems, start=1))
            raise CompatibilityError(f"the merge has {count} problem{'s' * (count > 1)}:\n{lines}"
                                     f"\n{self.text()}")


@takes_models("adapter", "target", "tuned", "base", "rope_from")
def preview(adapter: Paths, target: Path | str, out: Path | str, **options: Any) -> Preview:
    """Check a merge without reading a weight or writing a byte; the arguments are `merge`'s.

    A problem does not hide another: whatever can still be checked is.
    """
    problems = Problems(collect=True)
    request = problems.attempt(lambda: Request.of(adapter, target, out, **options))
    if request is None:
        return Preview(tuple(problems.lines))
    plan = prepare(request, problems)
    problems.attempt(lambda: require_inputs_outside(request.out, request.inputs()))
    problems.attempt(lambda: require_new(request.out, overwrite=request.overwrite))
    problems.attempt(lambda: _require_room(request.out, plan.written))
    counts = {kind: len(names) for kind, names in plan.changed().items()}
    return Preview(tuple(problems.lines), tuple(plan.written), counts["modules"],
                   counts["sidecar"], tuple(plan.dropped_buffers()), plan.change,
                   counts["models"], tuple(plan.vocabulary_lines()))


def _require_room(out: Path, written: Sequence[TensorInfo]) -> None:
    """Raise CheckpointError when the disk that `out` will lie on cannot hold the weights."""
    parent = next(p for p in out.absolute().parents if p.exists())
    require_space(parent, sum(info.num_bytes for info in written))
