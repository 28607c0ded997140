"""The search stage: what goes in, and what is written."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from extend.errors import CheckpointError
from extend.inputs import takes_models
from extend.lock import holding
from extend.manifest import Manifest
from extend.model_config import read_config
from extend.output import remove_directory, require_apart, write_json

if TYPE_CHECKING:
    from extend.search.report import Outcome
    from extend.search.session import Session

logger = logging.getLogger(__name__)
SEARCH_NAME = "search.json"
EVALUATIONS_NAME = "evaluations.jsonl"


@takes_models("model", "siblings")
def search(model: Path | str, out: Path | str, *, target_len: int, text: Path | str,
           siblings: Sequence[Path | str] = (), sibling_text: Sequence[Path | str] = (),
           budget: int = 80, merge_safe: bool = False, reach: float | None = None, seed: int = 0,
           rows: int | None = None, needles: int | None = None, short_tokens: int = 98304,
           sibling_tokens: int = 32768, drift: float = 0.005, sliding_window: str = "refuse",
           overwrite: bool = False) -> Path:
    """Find a RoPE for a longer context on the model itself, without training.

    Every evaluation is kept in `out`, so that the same call goes on after an interruption. When all
    is done, `out` holds search.json, table.txt, front.png, and each chosen setting as
    `rope-<name>.json`; rope.json is the compromise, or the merge-safe one where that was asked for.

    Args:
        model: checkpoint directory with plain RoPE.
        target_len: tokens.
        text: file or folder of text like what the model will read; one half of it is searched on,
            the other checks what was found. Files are read in the order of their names, the first 8
            million characters, or 64 for each token of the target where that is more.
        siblings: fine-tunes of the model; without any, disturbance is measured on two copies with
            small random deltas.
        sibling_text: text of the siblings, one for each or one for all; otherwise `text`.
        budget: most evaluations; one is a candidate at one length on one half of the text.
        merge_safe: look longer for settings that leave siblings alone.
        reach: needle loss, nats a token, that counts as reaching the target; otherwise only what is
            at most 0.05 nats above the best and not surely worse does. Where the best is above it,
            or above 1.5 when none is given, the output says that nothing reaches the target.
        rows: rows of a length that hide facts, in text and in filler by turns; unless given, 8 of
            64K tokens or more and up to 16 shorter ones. Intervals from fewer than 4 say little.
        needles: facts in a row; 16 unless given, or one when the model cannot answer 16 at its
            native length.
        short_tokens: about how much native-length text is read.
        sibling_tokens: about how much text each sibling reads.
        drift: norm of the random deltas, relative to each matrix.
        sliding_window: what to do with an active attention window shorter than `target_len`:
            "refuse", or "keep", which searches with the window as it is.

    Returns:
        The path of search.json.

    Raises:
        RecipeError: an option that is not accepted, a target not above the native length, or an
            `out` that holds what is read or lies in it.
        DataError: text that is missing, malformed or too short.
        CheckpointError: a model that cannot be read, or an `out` that holds something else.
        CompatibilityError: RoPE that is scaled already, a window that hides the target, or
            siblings of another model or with another tokenizer.
    """
    from extend.search.settings import Settings

    out = Path(out)
    settings = Settings(
        model=Path(model), text=Path(text), siblings=tuple(map(Path, siblings)),
        sibling_text=tuple(map(Path, sibling_text)), target_len=target_len, budget=budget,
        merge_safe=merge_safe, reach=reach, seed=seed, rows=rows, needles=needles,
        short_tokens=short_tokens, sibling_tokens=sibling_tokens, drift=drift,
        sliding_window=sliding_window)
    config = read_config(settings.model)
    settings.check(config)
    require_apart(out, settings.inputs())
    _check_out(out, overwrite)
    from extend.search.session import Session

    with holding(out):
        session = Session(settings, config)
        if overwrite:
            remove_directory(out)
        out.mkdir(parents=True, exist_ok=True)
        manifest = Manifest("search", settings.inputs(), {
            **session.fingerprint, "budget": budget, "merge_safe": merge_safe, "reach": reach,
            "sliding_window": sliding_window}, seed)
        outcome = session.run(out)
        _write(out, session, outcome, manifest)
    return out / SEARCH_NAME


def _check_out(out: Path, overwrite: bool) -> None:
    """Only a search of this tool may lie in `out` already."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file; give a directory as --out")
    if out.is_dir() and any(out.iterdir()) and not overwrite and not (
            out / EVALUATIONS_NAME).is_file():
        raise CheckpointError(f"{out}: holds something else than a search; give another --out, or "
                              "--overwrite to replace it")


def _write(out: Path, session: "Session", outcome: "Outcome", manifest: Manifest) -> None:
    from extend.search.plot import draw_front
    from extend.search.report import rope_file

    settings, spec = session.settings, session.config.rope
    draw_front(outcome, out / "front.png", f"{settings.model.resolve().name}: "
               f"{spec.original_len} to {settings.target_len} tokens without training")
    (out / "table.txt").write_text(outcome.table() + "\n", encoding="utf-8")
    for name, result in outcome.chosen.items():
        write_json(out / f"rope-{name}.json",
                   rope_file(result, settings.target_len, settings.model))
    best = outcome.chosen["merge-safe" if settings.merge_safe else "compromise"]
    write_json(out / "rope.json", rope_file(best, settings.target_len, settings.model))
    write_json(out / SEARCH_NAME, {
        "schema": 2, "model": str(settings.model), "native_len": spec.original_len,
        "target_len": settings.target_len, "rope": spec.to_json(),
        "native_needle_loss": session.native_needle, "left_out": session.refused,
        "fingerprint": session.fingerprint, **outcome.to_json(session.plan.rungs)})
    manifest.write(out, evaluations=outcome.lab.used,
                   chosen={name: r.candidate.name for name, r in outcome.chosen.items()})
