"""What is found out once about a process group: where its ranks run, and which way is open."""

import functools
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.constants import default_pg_timeout

from extend.ring.exchange import exchange
from extend.ring.peer import PeerBuffers
from extend.ring.peer_open import Facts, find_facts, open_peers, refusal

# By the group itself, so that what was found out goes when the group is destroyed: a Group holds no
# reference to it.
_groups: "WeakKeyDictionary[ProcessGroup, Group]" = WeakKeyDictionary()


def group_of(group: ProcessGroup | None) -> "Group":
    """What is known about `group`, None being the default group.

    Raises:
        ValueError: this process is not one of its ranks.
    """
    key = dist.group.WORLD if group is None else group
    if not isinstance(key, ProcessGroup):  # torch gives the others a number in its place
        raise ValueError("this process is not in the group; only its members call the ring")
    found = _groups.get(key)
    if found is None:
        found = _groups[key] = Group.of(key)
    return found


class Link:
    """Some ranks of a group, all of them or a part.

    Attributes:
        ranks: in the default group.
        published: how often each lane was.
        peers: the peer transport between them, if it works.
        reason: why it does or does not; None: not yet looked at.
    """

    def __init__(self, ranks: tuple[int, ...]):
        """Know nothing yet."""
        self.ranks = ranks
        self.published: dict[str, int] = {}
        self.peers: PeerBuffers | None = None
        self.reason: str | None = None


class Group:
    """A process group as seen from this process.

    Attributes:
        ranks: its ranks, numbered as in the default group.
        places: 0, 1, ..., its ranks numbered as in itself; `place` is this process's.
        timeout: the group's own.
    """

    def __init__(self, ranks: tuple[int, ...], place: int, timeout: timedelta, backend: str):
        """`backend` is what carries tensors on GPUs, `"nccl"` or another."""
        self.ranks, self.place, self.timeout, self.backend = ranks, place, timeout, backend
        self.places = tuple(range(len(ranks)))
        self._links: dict[tuple[int, ...], Link] = {}
        self._facts: list[Facts] | None = None

    @classmethod
    def of(cls, group: ProcessGroup) -> "Group":
        """Look at a process group; no message is sent."""
        backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
        ranks = tuple(dist.get_process_group_ranks(group))
        backend = backends.get("cuda", backends.get("cpu", ""))
        return cls(ranks, dist.get_rank(group), _timeout(group), backend)

    @classmethod
    def alone(cls) -> "Group":
        """A process by itself."""
        return cls((0,), 0, default_pg_timeout, "")

    def link(self, places: tuple[int, ...]) -> Link:
        """The link between the ranks at `places`."""
        if places not in self._links:
            self._links[places] = Link(tuple(self.ranks[place] for place in places))
        return self._links[places]

    def facts(self, group: ProcessGroup | None, timeout: timedelta) -> list[Facts]:
        """Where each rank of the `group` runs; at first a collective call of all of them.

        Raises:
            RankError: one does not take part.
        """
        if self._facts is None:
            mine = find_facts(self._on_gpus())
            said = exchange(self.ranks, mine, what="RingComm", timeout=timeout)
            if self._on_gpus():  # NCCL: all must have met before some of them exchange messages
                dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
            self._facts = [Facts(*fact) for fact in said]
        return self._facts

    def connect(self, link: Link, group: ProcessGroup | None, timeout: timedelta) -> None:
        """Open the peer transport, or find out why not; at first a collective call of the group."""
        if link.reason is not None:
            return
        if len(link.ranks) == 1:
            link.reason = "one rank alone"
        elif not self._on_gpus():
            link.reason = f"the group's backend is {self.backend}, which moves tensors on the CPU"
        else:
            facts = dict(zip(self.ranks, self.facts(group, timeout)))
            link.reason = refusal({rank: facts[rank] for rank in link.ranks})
            if link.reason is None:
                self._open(link, group, timeout)

    def _open(self, link: Link, group: ProcessGroup | None, timeout: timedelta) -> None:
        whole = link.ranks == self.ranks
        link.peers, link.reason = open_peers(
            functools.partial(_name, group, None if whole else link.ranks),
            link.ranks, self.ranks if whole else tuple(sorted(link.ranks)),
            link.ranks.index(self.ranks[self.place]), timeout,
        )  # fmt: skip

    def _on_gpus(self) -> bool:
        return self.backend == "nccl" and torch.cuda.is_available()


def _name(group: ProcessGroup | None, ranks: tuple[int, ...] | None) -> str:
    """The name of a process group for symmetric memory: `group`, or a new one of `ranks`."""
    if ranks is not None:
        # Used for its store only, so gloo will do; only members take part.
        group = dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
    return (dist.group.WORLD if group is None else group).group_name


def _timeout(group: ProcessGroup) -> timedelta:
    """The time-out of a group, which torch keeps with the backend."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout
    return default_pg_timeout
