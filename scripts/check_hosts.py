#!/usr/bin/env python
"""Train on two "hosts" of this machine: network namespaces with a cable between them.

    sudo .venv/bin/python scripts/check_hosts.py        # Linux, root, `ip`; a few minutes

Each host has its own network (no loopback in common) and, for one check, a disk of its own. Gloo
and the launcher's store go over the cable. What is checked is printed line by line; exit code 1
when something is not as it should be. `--keep DIR` keeps logs and outputs.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tiny_model import save_text, save_tiny_model

ROOT = Path(__file__).resolve().parents[1]
HOSTS = ("extend-a", "extend-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = ("extend-va", "extend-vb")
TIMEOUT_SECONDS = 240
RECIPE = """\
name: hosts
stages:
  - name: long
    stage: train
    model: model
    loss_chunk: 48
    save_every: 4
    schedule:
      - {length: 128, steps: STEPS, batch_rows: 2, lr: 3e-3, rope: {method: ntk}}
      - {length: 128, steps: 2, batch_rows: 1, lr: 1e-3, rope: {method: ntk}}
    data:
      - {kind: text, path: text.jsonl}
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    """Two namespaces and the cable; they are gone afterwards."""
    for name in HOSTS:
        ip("netns", "add", name)
    try:
        ip("link", "add", CABLE[0], "netns", HOSTS[0], "type", "veth", "peer", "name", CABLE[1],
           "netns", HOSTS[1])
        for name, address, end in zip(HOSTS, ADDRESSES, CABLE):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in HOSTS:
            ip("netns", "del", name)


def torchrun(host: int, nproc: int, port: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node",
            str(nproc), "--node_rank", str(host), "--master_addr", ADDRESSES[0], "--master_port",
            str(port)]


def torchrun_c10d(host: int, nproc: int, port: int) -> list[str]:
    """The first host has to be told that the address is its own."""
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node",
            str(nproc), "--rdzv_backend", "c10d", "--rdzv_id", "check", "--rdzv_endpoint",
            f"{ADDRESSES[0]}:{port}", "--rdzv_conf", f"is_host={int(host == 0)}", "--local_addr",
            ADDRESSES[host]]


def accelerate(host: int, nproc: int, port: int) -> list[str]:
    """With the flag for GPUs: on CPUs alone accelerate leaves several hosts to MPI."""
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "2",
            "--num_processes", str(2 * nproc), "--machine_rank", str(host), "--main_process_ip",
            ADDRESSES[0], "--main_process_port", str(port), "--module"]


class Launch:
    """The same command on both hosts, each with a log of its own."""

    port = 29400

    def __init__(self, launcher, work: Path, name: str, recipe: str, out: Path, nproc: int = 1,
                 mounts: str = ":"):
        Launch.port += 1
        self.logs, self.hosts = [work / f"{name}-{host}.log" for host in HOSTS], []
        self.out, self.start = out, time.monotonic()
        for number, (host, cable, log) in enumerate(zip(HOSTS, CABLE, self.logs)):
            command = launcher(number, nproc, Launch.port)
            command += ["extend"] if "--module" in command else ["-m", "extend"]
            command += ["train", str(work / recipe), "--out", str(out)]
            env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                                "GLOO_SOCKET_IFNAME": cable, "PYTHONPATH": str(ROOT)}
            prepare = mounts if number == 1 else ":"
            with log.open("w") as file:
                self.hosts.append(subprocess.Popen(
                    ["ip", "netns", "exec", host, "sh", "-c", prepare + ' && exec "$@"', "sh",
                     *command], stdout=file, stderr=file, env=env, start_new_session=True))

    def wait(self) -> list[int]:
        try:
            return [host.wait(TIMEOUT_SECONDS) for host in self.hosts]
        except subprocess.TimeoutExpired:
            for number in (0, 1):
                self.kill(number)
            return [host.wait() for host in self.hosts]

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while text not in self.said() and time.monotonic() < deadline:
            time.sleep(0.05)

    def kill(self, number: int) -> None:
        """As a power cut on one host: every process in its namespace."""
        found = subprocess.run(["ip", "netns", "pids", HOSTS[number]], capture_output=True,
                               text=True, check=True).stdout.split()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def terminate(self, number: int) -> None:
        """As a scheduler does."""
        self.hosts[number].send_signal(signal.SIGTERM)

    def said(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs)

    def told(self) -> list[str]:
        """Our own messages, those that only point to another host left out."""
        return [line for line in self.said().splitlines()
                if line.startswith("extend: ") and "told why there" not in line]


class Checks:
    def __init__(self):
        self.failed = 0

    def see(self, what: str, good: bool, detail: object = "") -> None:
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {what}{f': {detail}' if detail != '' else ''}",
              flush=True)


def digest(out: Path) -> str:
    file = out / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else "none"


def losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def prepare(work: Path) -> None:
    save_tiny_model(work / "model", "llama", native_len=64, rope_theta=10000.0)
    save_text(work / "text.jsonl", documents=40, lines=6)
    save_text(work / "other.jsonl", documents=39, lines=6)
    (work / "disk").mkdir()
    (work / "short.yaml").write_text(RECIPE.replace("STEPS", "8"))
    (work / "lasting.yaml").write_text(RECIPE.replace("STEPS", "400"))


def one_host(work: Path, recipe: str, out: Path) -> None:
    subprocess.run([sys.executable, "-m", "extend", "train", str(work / recipe), "--out", str(out),
                    "--nproc", "2", "--quiet"], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def check_launchers(work: Path, checks: Checks) -> None:
    one_host(work, "short.yaml", work / "one")
    for name, launcher in (("torchrun", torchrun), ("torchrun with c10d", torchrun_c10d),
                           ("accelerate launch", accelerate)):
        out = work / name.replace(" ", "-")
        run = Launch(launcher, work, out.name, "short.yaml", out)
        codes = run.wait()
        checks.see(f"{name}, 2 hosts of 1 process, ends", codes == [0, 0],
                   f"{time.monotonic() - run.start:.0f} s")
        checks.see("  bit for bit the model of 2 processes on one host",
                   digest(out) == digest(work / "one") != "none", digest(out))
    out = work / "four"
    codes = Launch(torchrun, work, "four", "short.yaml", out, nproc=2).wait()
    checks.see("torchrun, 2 hosts of 2 processes, ends", codes == [0, 0])
    worst = max(abs(a / b - 1) for a, b in zip(losses(out), losses(work / "one"), strict=True))
    checks.see("  losses of 2 processes within 1e-5", worst < 1e-5, f"{worst:.1e}")


def check_refusals(work: Path, checks: Checks) -> None:
    run = Launch(torchrun, work, "local", "short.yaml", work / "disk" / "out",
                 mounts=f"mount -t tmpfs none {work / 'disk'}")
    codes = run.wait()
    told = run.told()
    checks.see("an --out that hosts do not share is refused", 0 not in codes and len(told) == 1
               and "cannot see what host 0" in told[0], told)
    checks.see("  and nothing is left behind", not any((work / "disk").iterdir()))
    run = Launch(torchrun, work, "inputs", "short.yaml", work / "differ",
                 mounts=f"mount --bind {work / 'other.jsonl'} {work / 'text.jsonl'}")
    codes = run.wait()
    told = run.told()
    checks.see("a text that differs between hosts is refused", 0 not in codes and len(told) == 1
               and "inputs differ between hosts" in told[0], told)


def check_interruptions(work: Path, checks: Checks) -> None:
    one_host(work, "lasting.yaml", work / "lasting")
    out = work / "interrupted"
    run = Launch(torchrun, work, "term", "lasting.yaml", out)
    run.wait_for("saved step 8 ")
    run.terminate(1)
    codes, told = run.wait(), run.told()
    checks.see("SIGTERM on one host stops and saves both", 0 not in codes and len(told) == 1
               and "stopped by a signal after step" in told[0], told)
    run = Launch(torchrun, work, "kill", "lasting.yaml", out)
    run.wait_for("saved step 60 ")
    checks.see("  the same command goes on", "going on after step" in run.said())
    run.kill(1)
    begin = time.monotonic()
    codes, told = run.wait(), run.told()
    checks.see("a host that is gone ends the other", 0 not in codes and len(told) == 1,
               f"{time.monotonic() - begin:.0f} s, {told}")
    run = Launch(torchrun, work, "cable", "lasting.yaml", out)
    run.wait_for("saved step 120 ")
    ip("-n", HOSTS[1], "link", "set", CABLE[1], "down")
    begin = time.monotonic()
    codes, told = run.wait(), run.told()
    ip("-n", HOSTS[1], "link", "set", CABLE[1], "up")
    checks.see("a cut cable ends both", 0 not in codes and bool(told),
               f"{time.monotonic() - begin:.0f} s, {told}")
    codes = Launch(torchrun, work, "last", "lasting.yaml", out).wait()
    checks.see("  and the run ends bit for bit as one that was not disturbed",
               codes == [0, 0] and digest(out) == digest(work / "lasting") != "none", digest(out))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, help="directory for logs and outputs")
    arguments = parser.parse_args()
    checks = Checks()
    with tempfile.TemporaryDirectory() as temporary, two_hosts():
        work = (arguments.keep or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        prepare(work)
        for check in (check_launchers, check_refusals, check_interruptions):
            check(work, checks)
    print("all as it should be" if not checks.failed else f"{checks.failed} checks failed")
    return int(checks.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
