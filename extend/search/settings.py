"""The options of a search, checked before anything is loaded."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from extend import __version__
from extend.errors import CompatibilityError, RecipeError
from extend.manifest import hash_content
from extend.model_config import ModelConfig
from extend.registry import lookup
from extend.rope.factors import extension_factor
from extend.search.needles import MAX_FACTS

WINDOW_CHOICES = ("refuse", "keep")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What `search` was asked for; its docstring says what they mean."""

    model: Path
    text: Path
    siblings: tuple[Path, ...]
    sibling_text: tuple[Path, ...]
    target_len: int
    budget: int
    merge_safe: bool
    reach: float | None
    seed: int
    rows: int | None
    needles: int | None
    short_tokens: int
    sibling_tokens: int
    drift: float
    sliding_window: str = "refuse"

    def check(self, config: ModelConfig) -> None:
        """Check numbers, and that the model can be extended to the target.

        Raises:
            RecipeError: a value that is not accepted.
            CompatibilityError: the model's RoPE is scaled already, or a window hides the target.
        """
        self._check_numbers()
        if extension_factor(config.rope, self.target_len) <= 1:
            raise RecipeError(f"target length {self.target_len} is the native length of "
                              f"{self.model}; give a longer one")
        self._check_window(config)
        if len(self.sibling_text) not in (0, 1, len(self.siblings)):
            raise RecipeError(f"{len(self.sibling_text)} sibling texts for {len(self.siblings)} "
                              "siblings; give one for each, one for all, or none")

    def _check_window(self, config: ModelConfig) -> None:
        lookup(dict.fromkeys(WINDOW_CHOICES), self.sliding_window, "sliding_window")
        window = config.sliding_window
        if config.raw.get("dual_chunk_attention_config"):
            raise CompatibilityError(
                f"{config.path}: dual_chunk_attention_config makes engines ignore the RoPE keys; "
                "remove it, or start from the checkpoint it was added to")
        if self.sliding_window == "refuse" and window is not None and window < self.target_len:
            raise CompatibilityError(
                f"{config.path}: attention is limited to a sliding window of {window} tokens, "
                f"below the target length {self.target_len}; choose sliding_window 'keep' to "
                "search with the window as it is, or search on a checkpoint whose config has "
                "full attention in every layer")

    @property
    def keeps_window(self) -> bool:
        """Whether `extend rescale` must be told so too."""
        return self.sliding_window == "keep"

    def _check_numbers(self) -> None:
        for name, least in (("budget", 1), ("rows", 1), ("needles", 1), ("short_tokens", 1),
                            ("sibling_tokens", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)
                                      or value < least):
                raise RecipeError(f"{name} must be a whole number of at least {least}, not "
                                  f"{value!r}")
        if self.needles is not None and self.needles > MAX_FACTS:
            raise RecipeError(f"needles must be at most {MAX_FACTS}, not {self.needles}")
        if not 0 < self.drift < 1:
            raise RecipeError(f"drift must lie between 0 and 1, not {self.drift!r}")
        if self.reach is not None and not self.reach > 0:
            raise RecipeError(f"reach must be a loss above 0, not {self.reach!r}")

    def inputs(self) -> dict[str, Path]:
        """Role -> path of all that is read."""
        return {"model": self.model, "text": self.text,
                **{f"sibling.{name}": path for name, path in self.named_siblings().items()},
                **{f"sibling_text.{i}": path for i, path in enumerate(self.sibling_text)}}

    def named_siblings(self) -> dict[str, Path]:
        """Name -> directory; a name that two share gets a number."""
        named: dict[str, Path] = {}
        for path in self.siblings:
            name = path.resolve().name
            named[name if name not in named else f"{name} {len(named) + 1}"] = path
        return named

    def sibling_texts(self, names: Sequence[str]) -> dict[str, Path | None]:
        """Sibling -> its text, or None where the search's own text is read."""
        if not self.sibling_text:
            return dict.fromkeys(names)
        texts = self.sibling_text * len(names) if len(self.sibling_text) == 1 else self.sibling_text
        return dict(zip(names, texts, strict=True))

    def fingerprint(self) -> dict[str, object]:
        """What decides an evaluation's values, contents by their hashes, code by its versions."""
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        hashes = {role: hash_content(path)[:16] for role, path in self.inputs().items()}
        return {"schema": 1, "extend": __version__, **versions, **hashes,
                "target_len": self.target_len, "seed": self.seed, "short_tokens": self.short_tokens,
                "sibling_tokens": self.sibling_tokens,
                "drift": None if self.siblings else self.drift}
