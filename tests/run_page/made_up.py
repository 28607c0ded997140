"""A run directory as `extend run` leaves it, written by hand: no stage has to run for a test."""

import json
from pathlib import Path
from typing import Any

from extend.evaluate.score import proportion
from extend.evaluate.summary import summarize
from extend.manifest import hash_files

NATIVE = {"rope_theta": 10000.0, "rotary_dim": 32, "original_len": 512, "scaling": {}}
LONG = {**NATIVE, "scaling": {"rope_type": "yarn", "factor": 4.0,
                              "original_max_position_embeddings": 512}}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HASHES = {"base": "ba" * 32, "sibling": "5b" * 32, "text": "7e" * 32}
STAGES: list[dict[str, Any]] = [
    {"name": "eval-base", "stage": "eval", "options": {"model": "../base", "tasks": ["passkey"]}},
    {"name": "eval-sibling", "stage": "eval", "options": {"model": "../sibling"}},
    {"name": "rescaled", "stage": "rescale", "options": {"model": "../base", "to": 2048}},
    {"name": "long", "stage": "train", "options": {
        "model": "rescaled", "schedule": [{"length": 2048, "steps": 40, "lr": 1e-5}]}},
    {"name": "adapter", "stage": "extract", "options": {"base": "../base", "tuned": "long"}},
    {"name": "merged", "stage": "merge", "options": {"adapter": "adapter",
                                                     "target": "../sibling"}},
    {"name": "eval-long", "stage": "eval", "options": {"model": "long"}},
    {"name": "eval-merged", "stage": "eval", "options": {"model": "merged"}},
    {"name": "report", "stage": "report", "options": {"results": {
        "before": "eval-base", "long": "eval-long", "sibling + adapter": "eval-merged"}}}]
MOMENT = "2026-11-28T10:05:00+00:00"


class MadeUp:
    """The directory of a run; what it holds can be changed before the page is made."""

    def __init__(self, out: Path, name: str = "made-up", model: str = "/models/base"):
        self.out, self.model = out, model
        out.mkdir(parents=True)
        self.entries: dict[str, dict[str, Any]] = {}
        text = "name: made-up\nstages: [...]  # <b>not bold</b>\n"
        self.recipe = {"schema": 1, "name": name, "path": "/recipes/made-up.yaml",
                       "sha256": "12" * 32, "text": text, "stages": STAGES}
        self.save()

    def save(self) -> None:
        self.write("run.json", self.entries)
        self.write("recipe.json", self.recipe)

    def write(self, name: str, data: Any) -> None:
        path = self.out / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")

    def done(self, name: str, inputs: dict[str, tuple[str, str]], options: dict[str, Any],
             results: dict[str, Any], **more: Any) -> None:
        """A stage that is done; its files are written before."""
        directory = self.out / name
        directory.mkdir(exist_ok=True)
        self.write(f"{name}/manifest.json", {
            "schema": 1, "stage": next(s["stage"] for s in STAGES if s["name"] == name),
            "inputs": {role: {"path": path, "sha256": sha} for role, (path, sha) in inputs.items()},
            "options": options, "seed": 0, "versions": {"python": "3.12.1", "torch": "2.13.0"},
            "results": results, "wall_seconds": 61.5, "peak_memory_bytes": {"host": 2**30},
            "machine": {"system": "Linux", "processor": "A Processor", "cores": 8,
                        "memory_bytes": 2**36, "gpus": ["A GPU", "A GPU"]},
            "outputs": hash_files(directory), **more})
        self.entries[name] = {"started": "f", "found": {}, "state": "done", "starts": 1,
                              "began": MOMENT, "ended": MOMENT}
        self.save()

    def ended(self, name: str, state: str, **more: Any) -> None:
        self.entries[name] = {"started": "f", "found": {}, "state": state, "starts": 1,
                              "began": MOMENT, **more}
        self.save()

    def whole(self) -> "MadeUp":
        """Every stage is done."""
        for name, model, reach in (("eval-base", (self.model, HASHES["base"]), 512),
                                   ("eval-sibling", ("/models/sibling", HASHES["sibling"]), 512)):
            self.evaluate(name, model, reach)
        self.rescale()
        self.train()
        self.extract()
        self.merge()
        for name, made in (("eval-long", "long"), ("eval-merged", "merged")):
            self.evaluate(name, (str(self.out / made), "aa" * 32), 2048)
        self.write("report/index.html", "a report")
        self.done("report", {}, {}, {})
        return self

    def evaluate(self, name: str, model: tuple[str, str], reach: int,
                 lengths: tuple[int, ...] = (512, 2048), depths: int = 3,
                 tasks: tuple[str, ...] = ("passkey",)) -> None:
        self.write(f"{name}/results.json", results(model[0], reach, lengths, depths, tasks))
        self.done(name, {"model": model}, {}, {"rows": 1})

    def rescale(self) -> None:
        self.done("rescaled", {"model": (self.model, HASHES["base"])}, {},
                  {"rope_before": NATIVE, "rope_after": LONG, "max_position_embeddings": 2048})

    def metrics(self, steps: int, path: str, **spikes: float) -> None:
        lines = [{"step": s, "steps": steps, "phase": 1 + (s > steps // 2), "nll": 2.0 + 1 / s,
                  "loss": 2.0 + 1 / s, "lr": 1e-5, "grad_norm": spikes.get(f"step_{s}", 1.0),
                  "tokens_per_second": 1000.0, "peak_memory_bytes": 2**30,
                  "host_memory_bytes": 3 * 2**30} for s in range(1, steps + 1)]
        self.write(path, "".join(json.dumps(line) + "\n" for line in lines))

    def train(self, steps: int = 40, **spikes: float) -> None:
        self.metrics(steps, "long/metrics.jsonl", **spikes)
        self.done("long", {"model": (str(self.out / "rescaled"), "cc" * 32),
                           "data[0]": ("/texts/train", HASHES["text"])},
                  {"schedule": [{"length": 2048, "steps": steps, "batch_rows": 1, "lr": 1e-5,
                                 "rope": None}], "mode": "full"},
                  {"processes": 2, "rope_before": LONG, "rope_after": LONG,
                   "max_position_embeddings": 2048,
                   "metrics": {"step": steps, "tokens": 2048 * steps,
                               "host_memory_bytes": 3 * 2**30}},
                  peak_memory_bytes={"host": 2**30, "cuda:0": 5 * 2**30})

    def extract(self, layers: int = 4) -> None:
        self.write("adapter/report.json", adapter_report(layers))
        self.write("adapter/report.html", "the adapter's own report")
        self.done("adapter", {"base": (self.model, HASHES["base"]),
                              "tuned": (str(self.out / "long"), "dd" * 32)}, {}, {"modules": 28})

    def merge(self) -> None:
        self.done("merged", {"adapter": (str(self.out / "adapter"), "ee" * 32),
                             "target": ("/models/sibling", HASHES["sibling"])},
                  {"weight": 1.0, "method": "add", "options": {}, "layer_weights": None,
                   "sidecar": True, "dtype": None},
                  {"tensors": 38, "modules": 28, "sidecar_tensors": 10, "raw_tensors": 0,
                   "sidecar_left_out": 0, "vocabulary": ["2 rows moved"], "rope_theta": 10000.0,
                   "max_position_embeddings": 2048, "dropped_buffers": [],
                   "lineage": {str(self.out / "adapter"): {
                       "kind": "light", "verdict": "a light fine-tune of the base (cosine 0.99)"}}})


def results(model: str, reach: int, lengths: tuple[int, ...], depths: int,
            tasks: tuple[str, ...]) -> dict[str, Any]:
    """results.json of a model that answers up to `reach`; 5 prompts a cell, one loss."""
    rows: list[dict[str, Any]] = []
    for task in tasks:
        rows += [{"task": task, "name": task, "length": n, "depth": d / depths, "control": None,
                  "beyond_native": n > 512, "correct": 5 * (n <= reach),
                  **proportion(5 * (n <= reach), 5)} for n in lengths for d in range(depths)]
    rows.append({"task": "loss", "name": "short text", "length": 512, "depth": None,
                 "control": None, "loss": 2.5, "stderr": 0.01, "n": 4, "tokens": 2044,
                 "score": None})
    return {"schema": 1, "rows": rows, "summary": summarize(rows), "model": {
        "path": model, "sha256": "ab" * 32, "adapter": None, "max_position_embeddings": reach}}


def adapter_report(layers: int) -> dict[str, Any]:
    """report.json of `extract`: the parts that pages read."""
    modules = {f"model.layers.{layer}.{kind}": {
        "layer": layer, "kind": kind, "shape": [64, 64], "rank": 8, "relative_norm": 0.01,
        "residual": 0.1 + 0.001 * layer, "energy": 0.99, "noise_share": None, "noise_edge": None,
        "merge_loss": None, "delta_norm": 1.0, "norm": 1.0,
        "spectrum": {"rank": list(range(1, 129)), "value": [1 / r for r in range(1, 129)]}}
        for layer in range(layers) for kind in KINDS}
    point = {"adapter_bytes": 1000, "energy": 0.9, "mean_residual": 0.3}
    return {"modules": modules, "tensors": {}, "folded": {}, "left_out": {"model.odd.weight": {}},
            "unchanged": [], "beside": [], "measured": [],
            "curve": {"threshold": [point, {**point, "adapter_bytes": 4000}],
                      "equal_rank": [point]},
            "totals": {"modules": len(modules), "ranks": [8, 8], "mean_rank": 8.0, "energy": 0.99,
                       "mean_residual": 0.123, "max_residual": 0.2, "noise_share": None,
                       "merge_loss": None, "relative_norm": 0.01},
            "adapter": {"base": "base", "tuned": "long", "extraction": {}, "context": [512, 2048],
                        "dtypes": ["F32"], "rank": 8, "adapter_bytes": 4000, "sidecar_bytes": 0}}
