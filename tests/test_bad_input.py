"""Bad input as a user meets it: exit code 1, one message, and the disk as it was before."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

import extend.cli
from extend.adapter import extract
from extend.run_page import PAGE_NAME
from extend.run_record import PLAN_NAME, RECIPE_RECORD, RUN_RECORD
from tests.adapter_format.tiny_models import build, edit_json, make_models, save
from tests.train.tiny import save_model, save_text

ROOT = Path(__file__).parents[1]
RECIPE = """\
name: bad
stages:
  - name: long
    stage: train
    model: trainable
    nproc: 1
    save_every: 1
    loss_chunk: 48
    schedule:
      - {length: 128, steps: 1, lr: 1e-3, rope: {method: ntk}}
    data:
      - {kind: text, path: text.jsonl}
"""


@pytest.fixture(scope="module", autouse=True)
def quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    disable_progress_bar()  # the command line does so by a variable, read when this is imported
    yield
    torch.set_num_threads(threads)
    enable_progress_bar()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Input that every command accepts; never written to."""
    root = tmp_path_factory.mktemp("good")
    make_models(root, "llama", torch.float32)
    extract(root / "base", root / "tuned", root / "adapter", rank=4)
    make_models(root / "qwen2", "qwen2", torch.float32)
    save(build("llama", vocab_size=100), root / "other-vocabulary", torch.float32)
    save_model(root / "trainable")
    save_text(root)
    (root / "recipe.yaml").write_text(RECIPE)
    return root


@pytest.fixture
def inputs(good, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(good, tmp_path / "inputs"))


COMMANDS = {
    "rescale": ["rescale", "base", "--to", "1k", "--method", "ntk"],
    "train": ["train", "recipe.yaml"],
    "extract": ["extract", "--base", "base", "--tuned", "tuned", "--rank", "4"],
    "merge": ["merge", "--adapter", "adapter", "--target", "target"],
    "eval": ["eval", "trainable", "--tasks", "passkey", "--lengths", "320", "--depths", "1",
             "--trials", "1"],
    "run": ["run", "recipe.yaml"],
}
MODELS = {"rescale": "base", "train": "trainable", "extract": "tuned", "merge": "target",
          "eval": "trainable", "run": "trainable"}


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in root.rglob("*") if path.is_file() or not any(path.iterdir())}


def invoke(command: list[str], inputs: Path, out: Path):
    """Run a command line in which every name of a file in `inputs` stands for it."""
    arguments = [str(inputs / a) if (inputs / a).exists() or "missing" in a else a
                 for a in command]
    return CliRunner().invoke(extend.cli.main, [*arguments, "--out", str(out), "-q"])


def refuse(command: list[str], inputs: Path, *expected: str) -> str:
    """The command fails with one message that holds all of `expected`, and leaves nothing."""
    before = snapshot(inputs.parent)
    result = invoke(command, inputs, inputs.parent / "out")
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    told = "\n" + result.stderr  # warnings may stand before it
    assert told.count("\nextend: ") == told.count("extend: ") == 1
    assert "Traceback" not in result.stderr and len(result.stderr) < 4000
    for text in expected:
        assert text in result.stderr
    after = snapshot(inputs.parent)
    if command[0] == "run":  # what it was about to do, for the next call, and the page of it
        for name in (RUN_RECORD, RECIPE_RECORD, PLAN_NAME, PAGE_NAME):
            after.pop(str(inputs.parent / "out" / name), None)
    assert after == before
    return result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_good_input_is_accepted(name, inputs):
    """What the tests below break does work."""
    result = invoke(COMMANDS[name], inputs, inputs.parent / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(str(inputs.parent / "out"))


def weights(inputs: Path, name: str) -> Path:
    return inputs / MODELS[name] / "model.safetensors"


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def corrupt(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8:40] = b"x" * 32
    file.write_bytes(data)


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_weights(name, inputs):
    weights(inputs, name).unlink()
    refuse(COMMANDS[name], inputs, f"{inputs / MODELS[name]}: holds no model.safetensors")


@pytest.mark.parametrize("name", COMMANDS)
def test_truncated_weights(name, inputs):
    file = weights(inputs, name)
    size = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    truncate(file)
    refuse(COMMANDS[name], inputs, f"{file}: the header describes {size} bytes of tensors but the "
           f"file holds {size - 100}; it is truncated or damaged, fetch it again")


@pytest.mark.parametrize("name", COMMANDS)
def test_corrupt_weights(name, inputs):
    corrupt(weights(inputs, name))
    refuse(COMMANDS[name], inputs, f"{weights(inputs, name)}: damaged safetensors header; fetch "
           "the file again")


@pytest.mark.parametrize("damage", [Path.unlink, truncate, corrupt])
@pytest.mark.parametrize("name", COMMANDS)
def test_bad_shard(name, damage, inputs):
    directory = inputs / MODELS[name]
    shard(directory)
    damage(directory / "model-00002-of-00002.safetensors")
    refuse(COMMANDS[name], inputs, f"{directory / 'model-00002-of-00002.safetensors'}: ")


def shard(directory: Path) -> None:
    """Put the weights of a model into two files."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    size = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=size * 2 // 3)


@pytest.mark.parametrize("name", COMMANDS)
def test_quantized_model(name, inputs):
    config = inputs / MODELS[name] / "config.json"
    edit_json(config, quantization_config={"quant_method": "gptq", "bits": 4})
    refuse(COMMANDS[name], inputs, f"{config}: the weights are quantized (gptq); dequantize the "
           "model first")


@dataclass(frozen=True)
class Case:
    """A command line, what it must say, and how its input is spoilt first."""

    command: str
    expected: tuple[str, ...]
    arrange: Callable[[Path], object] = lambda inputs: None


def in_recipe(old: str, new: str) -> Callable[[Path], object]:
    assert old in RECIPE
    return lambda inputs: (inputs / "recipe.yaml").write_text(RECIPE.replace(old, new, 1))


CASES = {
    "missing model, rescale": Case(
        "rescale missing --to 1k", ("missing/config.json: no such file",
                                    "give the directory of a checkpoint")),
    "missing tuned model": Case(
        "extract --base base --tuned missing", ("missing/config.json: no such file",)),
    "missing adapter": Case(
        "merge --adapter missing --target target", ("missing/adapter_config.json: no such file",)),
    "missing target": Case(
        "merge --adapter adapter --target missing", ("missing/config.json: no such file",)),
    "missing haystack": Case(
        "eval trainable --tasks passkey-text --lengths 320 --haystack missing",
        ("missing: no such file",)),
    "missing results": Case("report base=missing", ("missing: no such file",
                                                    "give the output of `extend eval`")),
    "missing recipe": Case("run missing.yaml", ("missing.yaml: no such recipe",)),
    "missing model in a recipe": Case(
        "run recipe.yaml", ("recipe.yaml:5: model: ", "trainabel does not exist, and no earlier "
                            "stage is called 'trainabel'"),
        in_recipe("model: trainable", "model: trainabel")),
    "missing text in a recipe": Case(
        "train recipe.yaml", ("recipe.yaml:12: data.0.path: ", "texts.jsonl does not exist"),
        in_recipe("text.jsonl", "texts.jsonl")),
    "damaged adapter": Case(
        "merge --adapter adapter --target target",
        ("adapter/adapter_model.safetensors: the header describes", "truncated"),
        lambda inputs: truncate(inputs / "adapter" / "adapter_model.safetensors")),
    "other architecture, merge": Case(
        "merge --adapter adapter --target qwen2/target",
        ("adapter does not fit", "qwen2/target", "architecture is LlamaForCausalLM in the "
         "adapter's base but Qwen2ForCausalLM in the target", "Merge it into a fine-tune of")),
    "other architecture, extract": Case(
        "extract --base base --tuned qwen2/tuned",
        ("qwen2/tuned is not a fine-tune of", "architecture is LlamaForCausalLM in base but "
         "Qwen2ForCausalLM in tuned")),
    "other architecture, eval": Case(
        "eval trainable --lengths 320 --adapter adapter",
        ("adapter: was made for another model than", "vocab_size is 96 in the base of",
         "but 264 in")),
    "other vocabulary, extract": Case(
        "extract --base base --tuned other-vocabulary",
        ("other-vocabulary is not a fine-tune of", "vocab_size is 96 in base but 100 in tuned")),
    "unknown recipe key, run": Case(
        "run recipe.yaml", ("recipe.yaml:7: save_evry: unknown key; did you mean 'save_every'? "
                            "train accepts model, schedule, data"),
        in_recipe("save_every", "save_evry")),
    "unknown recipe key, train": Case(
        "train recipe.yaml", ("recipe.yaml:10: schedule.0.stepz: unknown key; did you mean "
                              "'steps'?",),
        in_recipe("steps: 1", "steps: 1, stepz: 1")),
    "rank larger than every matrix": Case(
        "extract --base base --tuned tuned --rank 65",
        ("rank is 65, larger than every matrix", "[64, 96]", "give a rank of at most 64")),
    "length not divisible": Case(
        "train recipe.yaml --nproc 2",
        ("layout 'zigzag': length 126 must be a multiple of 2 x 2 ranks = 4; use 124 or 128",),
        in_recipe("length: 128", "length: 126")),
    "length not divisible, run": Case(
        "run recipe.yaml",
        ("layout 'striped': length 126 must be a multiple of 1 x 4 ranks = 4; use 124 or 128",),
        lambda inputs: (inputs / "recipe.yaml").write_text(RECIPE.replace("128", "126").replace(
            "nproc: 1", "nproc: 4\n    layout: striped"))),
    "target below the native length": Case(
        "rescale base --to 127", ("target length 127 is below the model's native length 128",)),
    "target below the native length, train": Case(
        "train recipe.yaml", ("target length 32 is below the model's native length 64",),
        in_recipe("length: 128", "length: 32")),
    "rope made for less than the rows": Case(
        "train recipe.yaml", ("recipe.yaml:10: schedule.0: rope_to is 64 but rows have 128",),
        in_recipe("rope: {method: ntk}", "rope: {method: ntk}, rope_to: 64")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input(case, inputs):
    case.arrange(inputs)
    refuse(case.command.split(), inputs, *case.expected)


def test_all_problems_of_a_recipe_come_in_one_message(inputs):
    (inputs / "recipe.yaml").write_text(
        RECIPE.replace("save_every", "save_evry").replace("name: bad", "nmae: bad"))
    message = refuse(COMMANDS["run"], inputs, "recipe.yaml:7: save_evry", "recipe.yaml:1: unknown")
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("name", ["rescale", "train", "extract", "merge", "eval"])
def test_existing_output_is_not_touched(name, inputs):
    out = inputs.parent / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    refuse(COMMANDS[name], inputs, f"{out}: exists already; give another --out, or --overwrite")


@pytest.mark.parametrize("name", ["merge", "extract"])
def test_a_failing_replacement_keeps_the_old_output(name, inputs):
    assert invoke(COMMANDS[name], inputs, inputs.parent / "out").exit_code == 0
    truncate(weights(inputs, name))
    refuse([*COMMANDS[name], "--overwrite"], inputs, "truncated or damaged")


@pytest.mark.parametrize("name", ["extract", "merge"])
def test_disk_too_small_for_what_is_planned(name, inputs, monkeypatch):
    usage = SimpleNamespace(total=10**6, used=10**6 - 1000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refuse(COMMANDS[name], inputs, f"{inputs.parent}",
           "but only 1,000 bytes are free; free space or choose another --out")


def test_disk_too_small_for_a_trained_model(inputs, monkeypatch):
    """What was trained is kept, and the same command goes on from there."""
    def disk_usage(path):
        full = Path(path).name == ".out.partial"
        return SimpleNamespace(free=1000 if full else 10**9)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", disk_usage)
        result = invoke(COMMANDS["train"], inputs, inputs.parent / "out")
    assert result.exit_code == 1
    assert "only 1,000 bytes are free; free space or choose another --out" in result.stderr
    assert sorted(os.listdir(inputs.parent)) == ["inputs", "out.state"]
    assert (inputs.parent / "out.state" / "step-1").is_dir()
    assert invoke(COMMANDS["train"], inputs, inputs.parent / "out").exit_code == 0
    assert sorted(os.listdir(inputs.parent)) == ["inputs", "out"]


@contextmanager
def small_files(most_bytes=1500):
    """The kernel refuses to let a file grow beyond this: pytest's own log too, so no longer than
    needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["rescale", "extract", "merge"])
def test_write_that_fails(name, inputs):
    with small_files():
        refuse(COMMANDS[name], inputs, f"{inputs.parent / 'out'}: cannot be written",
               "File too large")


def test_evaluation_that_cannot_write(inputs):
    """Finished rows stay beside the output, to go on from."""
    with small_files():
        result = invoke(COMMANDS["eval"], inputs, inputs.parent / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"extend: {inputs.parent / 'out'}: cannot be written")
    assert sorted(os.listdir(inputs.parent)) == [".out.rows", "inputs"]


def test_training_state_that_cannot_be_written(inputs):
    with small_files(16_000):  # room for tokens and settings
        result = invoke(COMMANDS["train"], inputs, inputs.parent / "out")
    assert result.exit_code == 1
    assert "the training state cannot be written" in result.stderr
    assert "see that the disk is not full" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr) < 1500
    assert sorted(os.listdir(inputs.parent)) == ["inputs", "out.state"]


FULL_DISK = """\
import json, os, shutil, subprocess, sys
from pathlib import Path
from click.testing import CliRunner
import extend.cli

disk, commands = sys.argv[1], json.loads(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
for command in commands:
    result = CliRunner().invoke(extend.cli.main, [*command, "--out", f"{disk}/out", "-q"])
    left = sorted(os.listdir(disk))
    shutil.rmtree(f"{disk}/out.state", ignore_errors=True)
    print(json.dumps([result.exit_code, result.stderr, left]))
"""


def can_mount() -> bool:
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run(
        [unshare, "--user", "--map-root-user", "--mount", "true"], capture_output=True,
    ).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs Linux user namespaces to mount a small disk")
def test_a_disk_that_is_full(inputs, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    commands = [COMMANDS["rescale"], COMMANDS["merge"], COMMANDS["train"],
                [*COMMANDS["extract"][:-1], "64"]]
    commands = [[str(inputs / a) if (inputs / a).exists() else a for a in c] for c in commands]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", FULL_DISK,
         str(disk), json.dumps(commands)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    told = [message.removeprefix(f"extend: {disk}/") for _, message, _ in results]
    assert told[0] == ("out: cannot be written (no space left on the device; free space or choose "
                       "another --out)\n")
    # Space is asked for before the weights; a small file written earlier may find the disk full.
    for text in told[1:]:
        assert (" are free; free space or choose another --out\n" in text or text == told[0]), text
    # The parts of an extraction stay for the next try, if there was room to begin with them.
    assert [(code, left) for code, _, left in results[:3]] == [
        (1, []), (1, []), (1, ["out.state"])]
    assert results[3][0] == 1 and results[3][2] in ([], [".out.parts"])
