"""A search with its models and its text in memory."""

import logging
from dataclasses import replace
from pathlib import Path

from extend.errors import CompatibilityError, RecipeError
from extend.model_config import ModelConfig, read_config
from extend.search.candidates import Candidate, analytic_candidates
from extend.search.data import HELD_OUT, SEARCH, Sizes, SplitData, build_splits, read_sample
from extend.search.front import Bootstrap
from extend.search.goals import ANSWERS, Judge
from extend.search.lab import Lab
from extend.search.measure import Meter
from extend.search.models import (
    check_sibling,
    check_tokenizer,
    choose_device,
    load_model,
    make_siblings,
)
from extend.search.report import Outcome
from extend.search.settings import Settings
from extend.search.statistics import Statistics, needle_bootstrap
from extend.search.store import EVALUATIONS_NAME, EvaluationStore
from extend.search.strategy import Strategy, least_budget, make_plan
from extend.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_MANY, _ONE = 16, 1  # facts in a row, as a large and as a tiny model can answer them
_ROW_SQUARES = 2 ** 35  # rows x length squared, what attention costs, where the next line allows it
_ROWS = {_MANY: (8, 16), _ONE: (16, 32)}  # least and most rows of a length
_FEW = 4  # rows or windows; fewer say next to nothing of how sure a mean is
_MADE_SIBLINGS = 2


class Session:
    """Loads what a search needs, checks that text suffices, and finds out how to ask the model.

    Attributes:
        plan: how the budget will be spent.
        fingerprint: what decides an evaluation's values.
        native_needle: facts in a row -> needle loss of the unchanged model at its native length.

    Raises:
        ExtendError: what `extend.search.search` lists.
    """

    def __init__(self, settings: Settings, config: ModelConfig):
        self.settings, self.config = settings, config
        siblings = settings.named_siblings()
        for path in siblings.values():
            check_sibling(config, read_config(path))
        self.analytic, self.refused = analytic_candidates(config.rope, settings.target_len)
        tokenizer = load_tokenizer(settings.model)
        self._check_tokenizers(tokenizer)
        splits = self._build_splits(tokenizer, list(siblings) or _made_names())
        device = choose_device()
        base = load_model(settings.model, device)
        if siblings:
            models = {name: load_model(path, device) for name, path in siblings.items()}
        else:
            models = make_siblings(base, _made_names(), settings.drift, settings.seed)
        self.meter = Meter(base, models, splits, settings.target_len)
        self._drop_unknown()
        self.native_needle: dict[int, float] = {}
        self.sizes = self._choose_sizes()
        self._use(self.sizes)
        for split in self.meter.splits.values():  # what cannot work is said before hours of work
            split.rows(settings.target_len)
            _warn_of_few(split)
        self.plan = make_plan(config.rope.original_len, settings.target_len,
                              budget=settings.budget, num_analytic=len(self.analytic),
                              spent=len(self.native_needle))
        least = least_budget(len(self.analytic), len(self.native_needle))
        if settings.budget < least:
            raise RecipeError(f"budget is {settings.budget} but {least} evaluations are the least: "
                              f"{len(self.analytic)} analytic methods, the model as it is, and a "
                              "few to search and to check with; give more")
        self.fingerprint = self._fingerprint()

    def _check_tokenizers(self, tokenizer: object) -> None:
        siblings = self.settings.named_siblings()
        for name, own in self.settings.sibling_texts(list(siblings)).items():
            check_tokenizer(tokenizer, self.settings.model, siblings[name],
                            read_sample(own or self.settings.text))

    def _fingerprint(self) -> dict[str, object]:
        model = self.meter.base.model
        return {**self.settings.fingerprint(), "rows": self.sizes.rows,
                "needles": self.sizes.needles, "device": model.device.type,
                "dtype": str(model.dtype).removeprefix("torch.")}

    def run(self, out: Path) -> Outcome:
        """Search, writing every evaluation to `out`."""
        settings = self.settings
        store = EvaluationStore(out / EVALUATIONS_NAME, self.fingerprint)
        if len(store):
            logger.info("%d evaluations are there already", len(store))
        lab = Lab(self.meter, store, budget=settings.budget, spent=len(self.native_needle))
        splits = self.meter.splits
        judge = Judge(settings.target_len, settings.reach,
                      needle_bootstrap(splits[SEARCH], settings.target_len),
                      Bootstrap.of_items(len(splits[SEARCH].short), seed=1))
        chosen = Strategy(lab, self.config.rope, settings.target_len, self.analytic, self.plan,
                          judge, merge_safe=settings.merge_safe, seed=settings.seed).run()
        measured = [split for split in (SEARCH, HELD_OUT) if lab.results(settings.target_len,
                                                                         split)]
        return Outcome(lab, settings.target_len, chosen, {
            split: Statistics(splits[split], settings.target_len,
                              lab.results(settings.target_len, split)[0]) for split in measured},
            judge.limit, keeps_window=settings.keeps_window)

    def _build_splits(self, tokenizer: object, names: list[str]) -> dict[str, SplitData]:
        settings = self.settings
        sizes = Sizes(rows=1, needles=1,  # chosen when the model can be asked
                      short_tokens=settings.short_tokens, sibling_tokens=settings.sibling_tokens)
        return build_splits(tokenizer, settings.text, settings.sibling_texts(names),
                            native_len=self.config.rope.original_len,
                            target_len=settings.target_len, sizes=sizes, seed=settings.seed)

    def _drop_unknown(self) -> None:
        """Leave out methods that the installed transformers does not compute for this model."""
        for candidate in list(self.analytic):
            try:
                self.meter.base.use(candidate.rope, self.settings.target_len)
            except CompatibilityError as error:  # the config of this family cannot hold it
                if len(self.analytic) == 1:
                    raise
                self._leave_out(candidate, str(error))
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                self._leave_out(candidate, f"transformers cannot compute it ({error!r})")

    def _leave_out(self, candidate: Candidate, reason: str) -> None:
        self.analytic.remove(candidate)
        self.refused[candidate.name] = reason
        logger.info("%s left out: %s", candidate.name, reason)

    def _choose_sizes(self) -> Sizes:
        """Ask the model at its native length: 16 facts a row, or one when it cannot answer 16."""
        sizes = self.meter.splits[SEARCH].sizes
        offered = [self.settings.needles] if self.settings.needles else [_MANY, _ONE]
        native_len = self.config.rope.original_len
        for needles in offered:
            rows = self._rows(needles)
            self._use(replace(sizes, needles=needles, rows=rows))
            losses = self.meter.needle(self.config.rope, native_len, SEARCH)
            self.native_needle[needles] = sum(losses) / len(losses)
            logger.info("native length %d, %d facts a row: needle loss %.3f", native_len,
                        len(losses) // rows, self.native_needle[needles])
            if self.native_needle[needles] <= ANSWERS:
                break
        best = min(self.native_needle, key=lambda needles: self.native_needle[needles])
        if self.native_needle[best] > ANSWERS:
            logger.warning("the model answers hidden facts with a loss of %.2f nats a token at its "
                           "own length (guessing costs 2.3): needle losses at the target will say "
                           "little", self.native_needle[best])
        return replace(sizes, needles=best, rows=self._rows(best))

    def _rows(self, needles: int) -> int:
        return self.settings.rows or default_rows(self.settings.target_len, needles)

    def _use(self, sizes: Sizes) -> None:
        self.meter.splits = {name: replace(split, sizes=sizes, rows_by_length={})
                             for name, split in self.meter.splits.items()}


def default_rows(target_len: int, needles: int) -> int:
    """Rows of a length: as many as cost the same at every target, within bounds."""
    least, most = _ROWS[_ONE if needles == _ONE else _MANY]
    return min(max(_ROW_SQUARES // target_len ** 2, least), most)


def _warn_of_few(data: SplitData) -> None:
    counts = {"rows with hidden facts (give rows, --rows)": data.sizes.rows,
              "windows of short text (give more text)": len(data.short),
              **{f"windows of text for {name} (give more)": len(windows)
                 for name, windows in data.siblings.items()}}
    for what, count in counts.items():
        if count < _FEW:
            logger.warning("only %d %s: intervals rest on fewer than %d and say little", count,
                           what, _FEW)


def _made_names() -> list[str]:
    return [f"delta {number + 1}" for number in range(_MADE_SIBLINGS)]

