"""Key-value retrieval: a JSON object of random identifiers, one of which is asked for."""

import random
from dataclasses import dataclass
from typing import ClassVar

from extend.evaluate.frame import Frame
from extend.evaluate.tasks.lines import Lines
from extend.evaluate.tasks.needle import NeedleTask, Numbers, Quiz

_INTRO = ("Below is a JSON object whose keys and values are random identifiers. I will ask you for "
          "the value of one key.\n")


@dataclass(kw_only=True)
class KeyValueJson(NeedleTask):
    """Find the value of a key in a JSON object of pairs of UUIDs that fills the context.

    A model that copies any value is right once in `in_view` trials.

    Source: Liu et al. 2023, "Lost in the Middle", arXiv:2307.03172, section 3.
    """

    name: ClassVar[str] = "kv-json"
    chance: ClassVar[float] = 2.0 ** -128

    def quiz(self, rng: random.Random, numbers: Numbers) -> Quiz:
        key, value = _identifier(rng), _identifier(rng)
        # The last pair is never asked for: it ends without the comma of those that are.
        last = f'"{_identifier(rng)}": "{_identifier(rng)}"}}\n'
        return Quiz(intro=_INTRO, facts=[_pair(key, value)], keys=[value],
                    question=f'{last}What is the value of the key "{key}"?',
                    prefill=f' The value of the key "{key}" is "', answer=value)

    def source(self, frame: Frame, length: int, quiz: Quiz) -> Lines:
        return Lines(frame.tokenizer, lambda rng: _pair(_identifier(rng), _identifier(rng)),
                     self.name, opening="{\n")


def _pair(key: str, value: str) -> str:
    return f'"{key}": "{value}",\n'


def _identifier(rng: random.Random) -> str:
    """128 random bits in the form of a UUID."""
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
