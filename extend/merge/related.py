"""Is the target a fine-tune of the base that a delta was made from? Known from a sample of it."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from extend.checkpoint import Checkpoint, TensorInfo
from extend.delta.lineage import REFUSED, VERDICTS, WARNED
from extend.delta.sample import Sample, compare_with_sample, read_sample, take_sample
from extend.delta.sources import BaseModel
from extend.errors import CompatibilityError

log = logging.getLogger(__name__)


def require_related(adapters: Sequence[Path], base: Path | str | None, target: Checkpoint,
                    infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, Any]]:
    """Refuse a target that shares nothing with a delta's base; warn of one that drifted far.

    Nothing is known of an adapter without a sample (PEFT's, or of an earlier version) when no base
    is given: it is merged as it is.

    Args:
        adapters: directories; each that keeps a sample of its base is checked.
        base: of the deltas without one, and of `tuned - base`.
        infos: the target's `parameter_infos`.

    Returns:
        Path of an adapter or of the base -> `Lineage.summary`, for the manifest.

    Raises:
        CompatibilityError: an unrelated target, with the numbers.
        CheckpointError: a damaged sample, or infinite or NaN values.
    """
    samples = {str(path): sample for path in adapters if (sample := read_sample(Path(path)))}
    if base is not None:
        start = BaseModel.open(base, headers_only=True)
        samples[str(base)] = take_sample(start.files, start.infos)
    return {label: _check(label if label == str(base) else f"the base of {label}", sample, target,
                          infos) for label, sample in samples.items()}


def _check(whose: str, sample: Sample, target: Checkpoint,
           infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    found = compare_with_sample(sample, target, infos)
    advice = VERDICTS[found.kind][1]
    if found.kind in REFUSED:
        raise CompatibilityError(f"{target.directory} is no fine-tune of {whose}: "
                                 f"{found.verdict()}; {advice}. Give a fine-tune of that base; "
                                 "`extend lineage` shows the numbers layer by layer")
    if found.kind in WARNED:
        log.warning("%s against %s: %s; %s", target.directory, whose, found.verdict(), advice)
    return found.summary()
