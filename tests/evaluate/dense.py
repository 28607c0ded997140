"""What transformers says with eager attention and all logits: the oracle of losses."""

from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from extend.evaluate.backends.local import LocalBackend
from extend.evaluate.frame import Frame
from extend.evaluate.load import load_model
from extend.evaluate.measures import MEASURES
from extend.tokenizer import load_tokenizer

# Losses of up to 100 from sums of fp32 terms in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}


@lru_cache(maxsize=4)
def plain_model(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager",
                                                dtype=dtype)


def dense_logits(directory, ids, dtype=torch.float32):
    with torch.no_grad():
        return plain_model(directory, dtype)(torch.tensor([ids])).logits[0]


def dense_losses(directory, ids):
    """Of every token but the first, fp64 [len - 1]."""
    logits = dense_logits(directory, ids)[:-1].double()
    return functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").numpy()


def open_backend(directory, chunk=10_000):
    return LocalBackend(load_model(directory, device=torch.device("cpu"), dtype=torch.float32),
                        load_tokenizer(directory), chunk=chunk)


def measure(backend, task, lengths=(), trials=0, label="x"):
    """Prompts and rows of every cell of a task."""
    frame = Frame.of(backend.tokenizer)
    cells = task.cells(label, lengths, (), trials)
    rows = MEASURES[task.measure](backend, frame, task, cells, 0)
    return [[p.ids for p in task.prompts(frame, cell, 0)] for cell in cells], rows


def mean_error(values):
    values = np.asarray(values)
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5
