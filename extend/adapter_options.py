"""The options of the stages that make adapters, as a recipe writes them. Imports no torch."""

from typing import Annotated

from pydantic import Field, model_validator

from extend.option_types import FloatDtype, InputPath, ModelPath, Number, Options


class _SizeOptions(Options):
    """How large an adapter is: at most one of three."""

    rank: Annotated[int, Field(ge=1)] | None = None
    energy: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Share of each matrix's squared norm to keep."""
    adapter_bytes: Annotated[int, Field(ge=1)] | None = None
    """Largest size of the adapter file."""

    @model_validator(mode="after")
    def _one_criterion(self) -> "_SizeOptions":
        given = {key: getattr(self, key) for key in _SizeOptions.model_fields}
        listed = [f"{key} ({value})" for key, value in given.items() if value is not None]
        if len(listed) > 1:
            raise ValueError(f"{' and '.join(listed)} exclude each other")
        return self


class ExtractOptions(_SizeOptions):
    """extract: tuned - base as a LoRA adapter and a sidecar."""

    base: ModelPath
    tuned: ModelPath
    exact: bool = False
    embeddings: bool = True
    """Keep embedding and output head deltas in the sidecar."""
    fold_norms: bool = False
    """Put norm deltas into those of the linear weights that follow, for servers."""
    dtype: FloatDtype = "float32"
    seed: int = 0


class CutOptions(_SizeOptions):
    """cut: an adapter made smaller, by one of rank, energy and adapter_bytes."""

    adapter: ModelPath
    dtype: FloatDtype | None = None
    """Of the factors; the adapter's own unless given."""

    @model_validator(mode="after")
    def _some_criterion(self) -> "CutOptions":
        if self.rank is self.energy is self.adapter_bytes is None:
            raise ValueError("give one of rank, energy and adapter_bytes")
        return self


class AdapterReportOptions(Options):
    """adapter-report: the size of adapters against what they scored."""

    adapter: ModelPath
    results: dict[str, InputPath] = {}
    """Label -> results.json, its directory, or the name of an eval stage."""
    base: ModelPath | None = None
    """Checkpoint to measure the rounding of a merge on, for an adapter of PEFT's."""
