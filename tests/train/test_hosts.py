"""Two "hosts" on localhost, each with an agent of torchrun; scripts/check_hosts.py does more."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from extend.errors import ExtendError
from extend.train import hosts, train
from extend.train.mesh import join_processes
from tests.forked import ForkedPython
from tests.spawn import spawn
from tests.train.tiny import options, save_model, save_text

ROOT = Path(__file__).parents[2]
AGENT = """\
import sys
from torch.distributed.run import main
from tests.forked import forked_workers

with forked_workers():
    main(sys.argv[1:])
"""
RECIPE = """\
name: hosts
stages:
  - name: long
    stage: train
    model: model
    loss_chunk: 48
    schedule: [{length: 128, steps: 3, lr: %s, batch_rows: 2, rope: {method: ntk}}]
    data: [{kind: text, path: text.jsonl}]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hosts")
    save_model(directory / "model")
    save_text(directory)
    (directory / "good.yaml").write_text(RECIPE % "3e-3")
    (directory / "bad.yaml").write_text(RECIPE % "1e30")  # its second step overflows
    return directory


def launch(recipe: Path, out: Path) -> tuple[list[int], list[str], list[str]]:
    """`extend train` under two agents of torchrun; their exit codes, results and messages."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results, logs = ([out.with_name(f"{out.name}-{host}.{kind}") for host in (0, 1)]
                     for kind in ("out", "log"))
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    agents = [ForkedPython(
        [sys.executable, "-c", AGENT, "--nnodes", "2", "--node_rank", host, "--nproc_per_node", "1",
         "--master_addr", "localhost", "--master_port", port, "-m", "extend", "train", recipe,
         "--out", out], env=env, cwd=ROOT, stdout=results[host], stderr=logs[host])
        for host in (0, 1)]
    try:
        codes = [agent.wait(120) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.kill(agent.pid, 9)
    return codes, *([file.read_text() for file in files] for files in (results, logs))


def losses(out: Path) -> torch.Tensor:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines])


def test_two_hosts_equal_one_process(files: Path):
    codes, results, said = launch(files / "good.yaml", files / "two")
    assert codes == [0, 0], said
    assert results == [f"{files / 'two'}\n", ""]  # the main process alone
    run = options(files / "model", [{"kind": "text", "path": str(files / "text.jsonl")}], schedule=[
        {"length": 128, "steps": 3, "lr": 3e-3, "batch_rows": 2, "rope": {"method": "ntk"}}])
    train(run, files / "one")
    # Sums in another order.
    torch.testing.assert_close(losses(files / "two"), losses(files / "one"), rtol=1e-5, atol=0)


def test_the_first_error_of_all_hosts_is_told_once(files: Path):
    codes, _, said = launch(files / "bad.yaml", files / "failed")
    assert 0 not in codes
    told = [line for text in said for line in text.splitlines() if line.startswith("extend: ")]
    reasons = [line for line in told if "step 2 of phase 1: loss" in line]
    pointers = [line for line in told if "has failed, and told why there" in line]
    assert len(reasons) == 1 and len(reasons) + len(pointers) == len(told)
    assert not (files / "failed").exists()


def look_around(rank: int, world: int, directory: Path, change: str) -> str:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": "1"}
    described = hosts._describe
    if rank == 1 and change == "disk":
        hosts._appears = lambda token: False
    if rank == 1 and change == "text":
        hosts._describe = lambda path: described(path).replace("bytes", "other bytes")
    with join_processes() as processes:
        try:
            hosts.check_hosts({"model": str(directory / "model")}, directory / "out", processes)
        except ExtendError as error:
            return f"{type(error).__name__}: {error}"
    return "fine"


def look_three_times(rank: int, world: int, directory: Path) -> list[str]:
    plain = hosts._appears, hosts._describe
    found = []
    for change in ("none", "disk", "text"):
        found.append(look_around(rank, world, directory, change))
        hosts._appears, hosts._describe = plain
    return found


def test_hosts_that_differ_are_refused(files: Path):
    before = sorted(files.iterdir())
    seen = spawn(2, look_three_times, files)
    assert seen[0] == seen[1]  # all processes stop, with the same error
    fine, disk, text = seen[0]
    name = socket.gethostname()
    assert fine == "fine"
    assert disk.startswith(f"TrainingError: {files}: host 1 ({name}) cannot see what host 0")
    assert "inputs differ between hosts: model" in text and "on host 1" in text
    assert sorted(files.iterdir()) == before
