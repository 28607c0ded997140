"""Who holds what, and how it gets there: a rank publishes a tensor, the others fetch parts of it.

    window = comm.publish("keys", shape, k, write)          # write(buffer) fills what is offered
    transfer = window.fetch(step, into, select)             # from the rank `step` places back
    ...                                                     # compute, meanwhile
    transfer.wait()

All ranks of a comm publish and fetch in the same order, with the same shapes. `select(buffer,
receiver)` says what a receiver gets of the buffer of the rank that it fetches from; sender and
receiver both ask it, so it must depend on nothing else. A fetch runs beside what the current stream
gets *after* it: post it before the computation that should hide it. A lane is a name for one
publication at a time: the next one makes the windows before it stale, but what was fetched from
them and not yet waited for still arrives whole.

Two transports. "p2p": messages, gloo on the CPU and NCCL between GPUs. "peer": each GPU copies out
of memory that the others share (`extend.ring.peer`); GPUs of one host only. "auto" takes peer where
it works.

Nobody waits for ever: `RingComm(timeout_seconds=...)`, or the time-out of the process group. On the
CPU what comes of it is a RankError that names the rank which did not answer. On GPUs it is not the
host that waits, and a GPU cannot give up, so the process is ended: with "p2p" by NCCL's watchdog,
by the time-out of the group; with "peer" by ours (`extend.ring.watchdog`), after a line on stderr
and in the log that names the ranks and the lane. Only what a CUDA graph replays is not looked
after.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from extend.errors import CompatibilityError
from extend.registry import lookup
from extend.ring.links import Group, Link, group_of
from extend.ring.messages import Messages
from extend.ring.peer import PeerBuffers, PeerOffer
from extend.ring.transfer import Arrival, Request, Select, Transfer

__all__ = ["RingComm", "Transfer", "Window", "subcomm"]

TRANSPORTS = dict.fromkeys(("auto", "p2p", "peer"))


class RingComm:
    """Ranks that fetch from each other; cheap to make, what is costly is kept for each group.

    Attributes:
        rank, world: this process among the ranks, and their number.
        ranks: their numbers in the default group, in order.
        group: the process group that they are part of; None is the default group.
        timeout: how long a rank may keep the others waiting.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        transport: str = "auto",
        timeout_seconds: float | None = None,
    ):
        """Use `group`; None is the default group, or one lone process where none was set up.

        Args:
            transport: "auto", "p2p" or "peer".
            timeout_seconds: None is the time-out of the group.

        Raises:
            RecipeError: no such transport.
        """
        lookup(TRANSPORTS, transport, "transport")
        self.group, self._wanted = group, transport
        whole = group_of(group) if dist.is_initialized() else Group.alone()
        self._join(whole, whole.places, timeout_seconds)

    @classmethod
    def alone(cls) -> "RingComm":
        """A ring of one, whatever process groups there are."""
        comm = cls.__new__(cls)
        comm.group, comm._wanted = None, "p2p"
        comm._join(Group.alone(), (0,), None)
        return comm

    def _join(self, whole: Group, places: tuple[int, ...], timeout_seconds: float | None) -> None:
        if whole.place not in places:
            raise ValueError("this process is not a member; only members call the ring")
        self._whole, self._timeout_seconds = whole, timeout_seconds
        self.link: Link = whole.link(places)
        self.places = places
        self.ranks = self.link.ranks
        self.rank, self.world = places.index(whole.place), len(places)
        given = timeout_seconds is not None
        self.timeout = timedelta(seconds=timeout_seconds) if given else whole.timeout

    @property
    def transport(self) -> str:
        """"p2p" or "peer": what tensors on a GPU take. The first look is a collective call."""
        return "p2p" if self._wanted == "p2p" or self._peers() is None else "peer"

    @property
    def transport_reason(self) -> str:
        """Why it is that one."""
        return "asked for" if self._wanted == "p2p" else self._connected().reason

    @property
    def hosts(self) -> int:
        """On how many hosts the ranks run. The first look at a group is a collective call."""
        facts = self._whole.facts(self.group, self.timeout)
        return len({facts[place].host for place in self.places})

    def publish(
        self, lane: str, shape: Sequence[int], like: Tensor, write: Callable[[Tensor], object]
    ) -> "Window":
        """Offer a tensor of `shape`, of the dtype and on the device of `like`.

        `write(buffer)` fills it, at once or, with CUDA, in the current stream; afterwards what it
        read may be overwritten. On the peer transport the current stream first waits until every
        rank has read what was published in the lane before.

        Raises:
            CompatibilityError: the peer transport was asked for and does not work here, or the
                tensor is not on the current GPU.
            RankError: at the first call on GPUs, a rank does not take part.
        """
        shape = torch.Size(shape)
        peers = self._peers_for(like)
        if peers is not None and shape.numel():
            offer = peers.publish(lane, shape, like, write, self.timeout)
        else:
            buffer = like.new_empty(shape)
            write(buffer)
            offer = self._offer(lane, buffer)
        return Window(self, lane, offer)

    def publish_tensor(self, lane: str, tensor: Tensor) -> "Window":
        """Offer what `tensor` holds; messages take it as it is, if it is contiguous.

        So it must not change before every transfer of the window has been waited for.
        """
        if self._peers_for(tensor) is not None:
            return self.publish(lane, tensor.shape, tensor, lambda buffer: buffer.copy_(tensor))
        return Window(self, lane, self._offer(lane, tensor.contiguous()))

    def _offer(self, lane: str, buffer: Tensor) -> Messages:
        return Messages(self.group, self.places, self.ranks, self.rank, lane, buffer, self.timeout)

    def _peers_for(self, tensor: Tensor) -> PeerBuffers | None:
        if not tensor.is_cuda and self._wanted != "peer":
            return None
        peers = self._peers()
        if peers is not None:
            _check_device(tensor)
        return peers

    def _peers(self) -> PeerBuffers | None:
        if self.world == 1:
            return None
        if self._wanted == "p2p":
            self._whole.facts(self.group, self.timeout)  # NCCL wants everybody there the first time
            return None
        link = self._connected()
        if self._wanted == "peer" and link.peers is None:
            raise CompatibilityError(
                f"transport 'peer' does not work between {len(self.ranks)} ranks: {link.reason}; "
                "use transport='auto' or 'p2p'"
            )
        return link.peers

    def _connected(self) -> Link:
        self._whole.connect(self.link, self.group, self.timeout)
        return self.link


class Window:
    """What the ranks of a comm have published under one lane, until they do so again."""

    def __init__(self, comm: RingComm, lane: str, offer: "Messages | PeerOffer"):
        """Make the lane's earlier windows stale."""
        self._comm, self._lane, self._offer = comm, lane, offer
        self._closed = False
        counts = comm.link.published
        self._number = counts[lane] = counts.get(lane, 0) + 1

    def fetch(self, step: int, into: Tensor | None, select: Select) -> Transfer:
        """Start to fetch from rank (rank - step) % world; all ranks call it with the same step.

        Args:
            step: how many places back the owner is; 0 is this rank itself.
            into: where it goes, any strides, of the shape that is selected; None where nothing is.
            select: `select(buffer, receiver)`, a view of the owner's buffer, or None.

        Raises:
            RuntimeError: the lane was published again, or the window closed.
            ValueError: `into` is not what is selected.
        """
        return self.fetch_all([(step, into, select)])

    def fetch_all(self, requests: Sequence[tuple[int, Tensor | None, Select]]) -> Transfer:
        """Start several fetches `(step, into, select)` as one transfer; see `fetch`."""
        comm = self._comm
        if comm.link.published[self._lane] != self._number:
            raise RuntimeError(
                f"lane {self._lane!r} was published again since; fetch from the newest window"
            )
        if self._closed:
            raise RuntimeError(
                f"lane {self._lane!r}: fetch after close; close a window after its last fetch"
            )
        requests = [Request(step % comm.world, into, select) for step, into, select in requests]
        arrivals = [a for request in requests if (a := self._arrival(request)) is not None]
        return self._offer.fetch(requests, arrivals)

    def close(self) -> None:
        """Say that nothing more will be fetched, so that the owners may publish anew.

        Publishing in the lane again does so too. The sooner it is said, the less the owners wait.
        """
        self._closed = True
        self._offer.close()

    def _arrival(self, request: Request) -> Arrival | None:
        comm, into = self._comm, request.into
        owner = (comm.rank - request.step) % comm.world
        source = request.select(self._offer.view(owner), comm.rank)
        found, room = _form(source), _form(into)
        if found != room:
            raise ValueError(
                f"lane {self._lane!r}: rank {comm.rank} of {comm.world} fetches {found} from rank "
                f"{owner} into {room}; pass `into` of what `select` gives"
            )
        return None if room is None else Arrival(owner, into, source)


def subcomm(comm: RingComm, members: Sequence[int]) -> RingComm:
    """The ranks `members` of `comm`, this one among them, in that order.

    No communicator is made: messages use that of `comm`. Where the peer transport works, the
    members rendezvous at their first publication.

    Raises:
        ValueError: this rank is not a member.
    """
    if tuple(members) == tuple(range(comm.world)):
        return comm
    if tuple(members) == (comm.rank,):
        return RingComm.alone()
    part = RingComm.__new__(RingComm)
    part.group, part._wanted = comm.group, comm._wanted
    part._join(comm._whole, tuple(comm.places[m] for m in members), comm._timeout_seconds)
    return part


def _check_device(like: Tensor) -> None:
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        raise CompatibilityError(
            f"the ring's tensors are on {like.device}, the process's own GPU is "
            f"cuda:{torch.cuda.current_device()}; call torch.cuda.set_device before the first use"
        )


def _form(tensor: Tensor | None) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and dtype; nothing is nothing, however it is written."""
    return None if tensor is None or not tensor.numel() else (tuple(tensor.shape), tensor.dtype)
