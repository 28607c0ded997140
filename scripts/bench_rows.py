#!/usr/bin/env python3
"""Time how the processes of a host come by their tokens, and how evenly rows fall on groups.

    python scripts/bench_rows.py tokens --model MODEL --text FOLDER --processes 4 --out runs/rows
    python scripts/bench_rows.py balance --groups 8 --batch-rows 32 --out runs/rows

`tokens`: all processes of a host start at once, each tokenising the text for itself (`alone`),
sharing an empty cache (`first`), and finding it full (`second`); seconds until the last one has
its tokens, seconds of CPU of all together, and the peak memory that each process added.

`balance`: steps of 128K rows on a Llama-3.1-8B shape, of which 40 % are short documents (at most
4K), 30 % are documents of lognormal length (median 6K) and 30 % whole documents of 128K or more;
how long the groups' attention takes over the mean, as rows are dealt and as they come, and what
that makes of the whole step where attention runs as fast as matrix products. Writes JSON.
"""

import argparse
import json
import multiprocessing as mp
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, not installed

import numpy as np  # noqa: E402

LENGTH = 131072
LINEAR, WIDTH, LAYERS = 7.5e9, 4096, 32  # parameters of matrices, channels of a layer's heads


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tokens", "balance"))
    parser.add_argument("--model", help="a directory with a tokenizer")
    parser.add_argument("--text", help="file or folder")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def usage() -> np.ndarray:
    """Peak MiB and seconds of CPU of this process."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return np.array([own.ru_maxrss / 1024, own.ru_utime + own.ru_stime])


def load(model: str, text: str, cache: str | None, digest: str, ready: Any, told: Any) -> None:
    """One process: wait for the others, load the rows, tell the peak memory that they added."""
    from transformers import AutoTokenizer

    from extend.train.text import TokenSource
    from extend.train.token_cache import TokenCache

    tokenizer = AutoTokenizer.from_pretrained(model)
    ready.wait()
    before = usage()
    tokens = TokenCache([Path(cache)] if cache else [], {text: digest})
    documents = TokenSource(tokenizer, tokens).text(text, "text")
    told.put((len(documents.ids), *(usage() - before)))


def measure_tokens(run: argparse.Namespace) -> dict[str, Any]:
    from extend.manifest import hash_content

    context, cache, result = mp.get_context("spawn"), run.out / "cache", {}
    shutil.rmtree(cache, ignore_errors=True)
    digest = hash_content(run.text)
    for start, where in (("alone", None), ("first", str(cache)), ("second", str(cache))):
        ready, told = context.Barrier(run.processes + 1), context.Queue()
        processes = [context.Process(target=load, args=(run.model, run.text, where, digest, ready,
                                                        told)) for _ in range(run.processes)]
        for process in processes:
            process.start()
        ready.wait()
        begin = time.monotonic()
        answers = [told.get() for _ in processes]
        seconds = time.monotonic() - begin
        for process in processes:
            process.join()
        tokens = answers[0][0]
        result[start] = {"seconds": round(seconds, 2), "tokens": tokens,
                         "tokens_per_second": round(tokens / seconds),
                         "cpu_seconds": round(float(sum(cpu for *_, cpu in answers)), 2),
                         "added_mib": [round(float(peak)) for _, peak, _ in answers]}
    return result


def made_rows() -> Any:
    """Rows of documents whose lengths alone matter."""
    from extend.train.stream import PackedStream
    from extend.train.token_cache import Documents

    rng = np.random.default_rng(0)
    lengths = {"short": rng.lognormal(np.log(1500), 1, 60000),
               "middle": rng.lognormal(np.log(6000), 1.2, 20000),
               "long": LENGTH * (1 + rng.exponential(0.5, 800))}
    streams = {}
    for name, some in lengths.items():
        offsets = np.concatenate(([0], np.cumsum(some.astype(np.int64) + 1)))
        documents = Documents(name, np.zeros(0, np.int32), offsets, None, 0)
        streams[name] = PackedStream(documents, prefix=[], eos=0, seed=0,
                                     document_length=4096 if name == "short" else None)
    chosen = rng.choice(list(streams), size=100_000, p=[0.4, 0.3, 0.3])
    drawn = dict.fromkeys(streams, 0)
    for name in chosen:
        yield np.diff(streams[name].bounds(0, drawn[name], LENGTH)).tolist()
        drawn[name] += 1


def measure_balance(run: argparse.Namespace) -> dict[str, Any]:
    from extend.train.deal import deal, imbalance

    rows, found = made_rows(), {"dealt": [], "as_they_come": []}
    whole = {name: [] for name in found}
    linear = 6 * LINEAR * LENGTH
    for _ in range(run.steps):
        costs = [sum(n * n for n in next(rows)) for _ in range(run.batch_rows)]
        flops = [round(linear + 6 * WIDTH * LAYERS * cost) for cost in costs]
        kinds = [False] * len(costs)
        turns = {"dealt": deal(costs, kinds, run.groups), "as_they_come": [
            tuple(range(i, i + run.groups)) for i in range(0, len(costs), run.groups)]}
        for name, some in turns.items():
            found[name].append(imbalance([[turn] for turn in some], costs))
            whole[name].append(imbalance([[turn] for turn in some], flops))
    return {"groups": run.groups, "batch_rows": run.batch_rows, "steps": run.steps,
            "attention": {name: round(float(np.mean(x)), 4) for name, x in found.items()},
            "step": {name: round(float(np.mean(x)), 4) for name, x in whole.items()}}


def main() -> None:
    run = parse()
    run.out.mkdir(parents=True, exist_ok=True)
    result = {"tokens": measure_tokens, "balance": measure_balance}[run.what](run)
    (run.out / f"{run.what}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
