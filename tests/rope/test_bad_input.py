"""Bad input to the stage: one clear error, and the disk as it was before."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from extend.errors import CheckpointError, CompatibilityError, ExtendError, RecipeError
from extend.rope import rescale
from tests.rope.conftest import NATIVE, edit_config

TARGET = 4 * NATIVE


def check_refused(model: Path, parent: Path, error: type[ExtendError], message: str,
                  **options) -> None:
    """The call fails with this error and leaves the disk as it was."""
    before = sorted(str(p) for p in parent.rglob("*"))
    with pytest.raises(error) as caught:
        rescale(model, parent / "out", **{"target_len": TARGET, **options})
    assert message in str(caught.value)
    assert sorted(str(p) for p in parent.rglob("*")) == before


def no_directory(path: Path) -> None:
    shutil.rmtree(path)


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def broken_config(path: Path) -> None:
    (path / "config.json").write_text('{"hidden_size": 64,')


def mistyped_config(path: Path) -> None:
    edit_config(path, num_attention_heads="four")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def corrupt_header(path: Path) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"x" * 32
    file.write_bytes(data)


def quantized(path: Path) -> None:
    edit_config(path, quantization_config={"quant_method": "gptq", "bits": 4})


def two_thetas(path: Path) -> None:
    edit_config(path, rope_theta=5e5)


def scaled(path: Path) -> None:
    edit_config(path, rope_scaling={"type": "linear", "factor": 2.0},
                rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})


def other_vocabulary(path: Path) -> None:
    edit_config(path, vocab_size=97)


def other_heads(path: Path) -> None:
    edit_config(path, num_key_value_heads=4)


def more_layers(path: Path) -> None:
    edit_config(path, num_hidden_layers=3)


def other_names(path: Path) -> None:
    file = path / "model.safetensors"
    save_file({n.replace("embed_tokens", "wte"): t.clone() for n, t in load_file(file).items()},
              file)


def dual_chunk(path: Path) -> None:
    edit_config(path, dual_chunk_attention_config={"chunk_size": 128})


def broken_tokenizer(path: Path) -> None:
    (path / "tokenizer_config.json").write_text("[]")


@pytest.mark.parametrize(("damage", "error", "message"), [
    (no_directory, CheckpointError, "config.json: no such file"),
    (no_config, CheckpointError, "config.json: no such file"),
    (broken_config, CheckpointError, "config.json: not valid JSON"),
    (mistyped_config, CheckpointError, "config.json: num_attention_heads is 'four'; it must be a"),
    (no_weights, CheckpointError, "holds no model.safetensors"),
    (truncated, CheckpointError, "model.safetensors: the header describes"),
    (corrupt_header, CheckpointError, "damaged safetensors header"),
    (quantized, CompatibilityError, "quantized (gptq)"),
    (two_thetas, CompatibilityError, "rope_theta is 500000.0 at the top but 10000.0"),
    (scaled, CompatibilityError, "extended already: rope_type 'linear' by a factor of 2 with "),
    (other_vocabulary, CompatibilityError, "has shape (96, 64) but config.json asks for (97, 64)"),
    (other_heads, CompatibilityError, "k_proj.weight has shape (32, 64)"),
    (more_layers, CompatibilityError, "the weights hold 2 layers but config.json asks for 3"),
    (other_names, CompatibilityError, "holds no embed_tokens.weight"),
    (dual_chunk, CompatibilityError, "dual_chunk_attention_config"),
    (broken_tokenizer, CheckpointError, "tokenizer_config.json: holds a JSON list"),
])
def test_bad_models(damage, error, message, damaged, tmp_path):
    damage(damaged)
    check_refused(damaged, tmp_path, error, message)


@pytest.mark.parametrize(("options", "message"), [
    ({"target_len": NATIVE - 1}, "target length 255 is below the model's native length 256"),
    ({"target_len": TARGET, "method": "yarm"}, "method: unknown 'yarm'; did you mean 'yarn'?"),
    ({"target_len": TARGET, "method": "yarn", "beta": 3}, "method yarn: unknown option 'beta'"),
    ({"target_len": TARGET, "method": "theta"}, "method theta: missing option rope_theta"),
    ({"target_len": TARGET, "sliding_window": "dorp"}, "sliding_window: unknown 'dorp'; did you"),
])
def test_bad_options(options, message, damaged, tmp_path):
    check_refused(damaged, tmp_path, RecipeError, message, **options)


def test_missing_shard(sharded, tmp_path):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    check_refused(sharded, tmp_path, CheckpointError, "00002.safetensors: no such file")


def test_truncated_shard(sharded, tmp_path):
    os.truncate(sharded / "model-00002-of-00002.safetensors", 900)
    check_refused(sharded, tmp_path, CheckpointError, "model-00002-of-00002.safetensors: ")


def test_existing_out(damaged, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    check_refused(damaged, tmp_path, CheckpointError, f"{out}: exists already")
    assert os.listdir(out) == ["mine.txt"]


def test_disk_full(damaged, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    check_refused(damaged, tmp_path, CheckpointError, "no space left on the device")


def test_out_and_model_must_be_apart(damaged, tmp_path):
    for out in (damaged, damaged / "inside", damaged.parent):
        with pytest.raises(RecipeError, match="lie in one another"):
            rescale(damaged, out, target_len=TARGET, overwrite=True)
    rescale(damaged, tmp_path / "fine", target_len=TARGET)
