"""Whether ranks can use the peer transport: where they run, and whether their GPUs share memory."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch

from extend.ring.exchange import exchange, name_ranks
from extend.ring.peer import PeerBuffers, SharedBuffer
from extend.ring.peer_cuda import CudaDevice, load_driver
from extend.ring.watchdog import process_watchdog

PROBE_BYTES = 4096
PROBE_SECONDS = 10.0


class Facts(NamedTuple):
    """Where a rank runs and which GPUs it reaches; the latter are empty without GPUs."""

    host: str
    gpu: str = ""
    visible: Sequence[str] = ()
    reachable: Sequence[str] = ()
    problem: str = ""


def find_facts(on_gpus: bool) -> Facts:
    """Those of this process."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # two containers may have one name
    host = f"{platform.node()} {boot.read_text().strip() if boot.exists() else ''}"
    if not on_gpus:
        return Facts(host)
    mine = torch.cuda.current_device()
    indices = range(torch.cuda.device_count())
    names = [str(torch.cuda.get_device_properties(i).uuid) for i in indices]
    reachable = [
        names[i] for i in indices if i == mine or torch.cuda.can_device_access_peer(mine, i)
    ]
    return Facts(host, names[mine], names, reachable)


def refusal(facts: Mapping[int, Facts]) -> str | None:
    """Why these ranks' GPUs cannot share memory, where that is known beforehand."""
    hosts = {fact.host for fact in facts.values()}
    if len(hosts) > 1:
        names = ", ".join(sorted({host.split()[0] for host in hosts}))
        return f"the ranks run on {len(hosts)} hosts ({names})"
    for rank, fact in facts.items():
        for other, its in facts.items():
            if its.gpu in fact.visible and its.gpu not in fact.reachable:
                return f"the GPU of rank {rank} does not reach the memory of that of rank {other}"
    return None


def open_peers(
    group_name: Callable[[], str], ranks: tuple[int, ...], order: tuple[int, ...], rank: int,
    timeout: timedelta,
) -> tuple[PeerBuffers | None, str]:  # fmt: skip
    """The transport between `ranks` and why, or (None, why not), which all of them then get.

    Args:
        group_name: gives the name of a process group of these ranks.
        ranks, rank: of the default group, in the order of the comm; this one's number there.
        order: the same ranks in the order of that process group.
    """
    opened: list = []

    def open_memory() -> None:
        device = CudaDevice(group_name(), [order.index(r) for r in ranks], rank)
        opened.extend((device, device.allocate(PROBE_BYTES)))

    def try_memory() -> str:
        seconds = min(PROBE_SECONDS, timeout.total_seconds() / 4)
        return probe(opened[1], rank, ranks, seconds)

    # One at a time: a rank that failed would never say the word that the others would wait for.
    for step in (load_driver, open_memory, try_memory):
        said = exchange(ranks, _problem_of(step), what="RingComm", timeout=timeout)
        for other, complaint in zip(ranks, said):
            if complaint:
                return None, f"rank {other}: {complaint}"
    device, watchdog = opened[0], process_watchdog()
    watchdog.start(device.enter_thread)
    peers = PeerBuffers(device, rank, ranks, watchdog)
    return peers, "all GPUs are in one host and read each other's memory"


def _problem_of(step: Callable[[], object]) -> str:
    try:
        found = step()
    except (RuntimeError, ImportError, AttributeError, OSError) as error:
        return f"no symmetric memory ({str(error).splitlines()[0]})"
    return found if isinstance(found, str) else ""


def probe(buffer: SharedBuffer, rank: int, ranks: tuple[int, ...], seconds: float) -> str:
    """Read a number that each rank wrote; return what is wrong, or nothing.

    The host waits for every flag, `seconds` at most, before a stream does, which cannot give up.
    """
    form = (torch.Size((1,)), torch.int32)
    others = [r for r in range(len(ranks)) if r != rank]
    buffer.wait_until_read()
    buffer.view(rank, *form).fill_(rank + 1)
    buffer.say_written()
    silent = _silent(buffer, others, seconds, read=False)
    if not silent:
        for owner in others:
            buffer.wait_until_written(owner)
        found = [buffer.view(owner, *form).item() for owner in range(len(ranks))]
        for owner in others:
            buffer.say_read(owner)
        wanted = list(range(1, len(ranks) + 1))
        if found != wanted:
            return f"reads {found} where the ranks wrote {wanted}"
        silent = _silent(buffer, others, seconds, read=True)
    return f"no flag comes from {name_ranks([ranks[r] for r in silent])}" if silent else ""


def _silent(
    buffer: SharedBuffer, others: Sequence[int], seconds: float, *, read: bool
) -> list[int]:
    """Which of the `others` have not said their word in `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        flags = buffer.look()
        said = [] if flags is None else flags.read if read else flags.written
        silent = [r for r in others if not said or not said[r]]
        if not silent or time.monotonic() > deadline:
            return silent
        time.sleep(0.001)
