"""The evaluation tasks. To add one: a class like those here, a line in TASKS, a test."""

from extend.evaluate.tasks.babi import Babi
from extend.evaluate.tasks.exact_match import ExactMatch
from extend.evaluate.tasks.harness import LMEval
from extend.evaluate.tasks.kv_json import KeyValueJson
from extend.evaluate.tasks.long_text import KeyTokens, LossByPosition, SlidingPerplexity
from extend.evaluate.tasks.loss import Divergence, Loss
from extend.evaluate.tasks.multi_needle import MultiKey, MultiQuery, MultiValue
from extend.evaluate.tasks.number_needle import NumberNeedle
from extend.evaluate.tasks.passkey import Passkey, PasskeyHard, PasskeyText
from extend.evaluate.tasks.passkey_stream import PasskeyStream
from extend.evaluate.tasks.ruler import RULER6, RULER13
from extend.evaluate.tasks.task import Cell, Prompt, Task

__all__ = ["GROUPS", "TASKS", "Cell", "Prompt", "Task"]

# Names that stand for several tasks.
GROUPS: dict[str, tuple[str, ...]] = {"ruler6": tuple(RULER6), "ruler13": tuple(RULER13)}

TASKS: dict[str, type[Task]] = {
    "passkey": Passkey, "passkey-text": PasskeyText, "passkey-hard": PasskeyHard,
    "passkey-stream": PasskeyStream, "number-needle": NumberNeedle, "multi-key": MultiKey,
    "multi-query": MultiQuery, "multi-value": MultiValue, "kv-json": KeyValueJson, "babi": Babi,
    **RULER13, "exact-match": ExactMatch, "loss": Loss, "divergence": Divergence,
    "loss-by-position": LossByPosition, "sliding-perplexity": SlidingPerplexity,
    "key-tokens": KeyTokens, "lm-eval": LMEval}
