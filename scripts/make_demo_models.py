#!/usr/bin/env python3
"""Train the two tiny models of the CPU demo from nothing: a base and its sibling.

    python scripts/make_demo_models.py --out assets/demo

base     a Llama of 4 layers and 0.87 M parameters with a native length of 256 tokens. It has seen
         the passkey test (a number hidden in repeated filler sentences), made-up prose, and notes
         that are told again as a sentence: `Note: cedar 48213 amber` -> `The name is "cedar", ...`.
sibling  the base after a short fine-tune on a skill it does not have: to write such a note as JSON.

Also written: skill.jsonl, held-out examples of that skill, and notes.jsonl, text of the base's
own kind for replay while the context is extended. All text comes from the word lists below and
from `extend`'s passkey wording; nothing is downloaded. The same seed gives the same models up to
the order in which the CPU adds numbers. Takes about ten minutes on two cores and ends by printing
the scores it has checked.
"""

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from extend.checkpoint import atomic_directory
from extend.evaluate.tasks.passkey import NEEDLE, QUESTION, Passkey
from extend.haystack import FILLER, INTRO, Haystack, split_answer
from extend.train.retrieval import RetrievalRows

NATIVE_LEN = 256
VOCAB_SIZE = 640
EOS = "<eos>"

NAMES = """
amber birch cedar coral daisy ebony fern flint grove hazel heron ivory jade juniper kestrel laurel
linden lotus maple marble meadow moss myrtle olive onyx opal orchid otter pearl pebble pine poppy
quartz raven reed river robin rowan ruby sage slate sparrow thistle topaz tulip violet walnut willow
""".split()
COLORS = "red green blue yellow black white brown grey pink orange".split()
ADJECTIVES = "old small quiet bright cold warm tall early late empty heavy soft".split()
NOUNS = """
house road river boat garden field market letter lamp window table tower bridge horse forest village
""".split()
VERBS = "sees finds leaves opens keeps moves paints visits follows reaches".split()
PLACES = "near behind under above beside".split()

Row = tuple[list[int], list[bool]]
"""Token ids of a row, and which of them are answers."""
