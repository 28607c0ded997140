"""Where cells are measured: by processes of this machine, by ranks that share rows, by a server.

Imports no torch by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from extend.errors import RecipeError
from extend.evaluate.plan import PlannedTask, Unit
from extend.registry import suggest

if TYPE_CHECKING:
    from extend.evaluate.backends.server import ServerBackend
    from extend.evaluate.cells import Job

Server = str | Mapping[str, Any]


class Runner(Protocol):
    """Measures units and keeps their rows.

    Attributes:
        settings: what the rows depend on, for the results and for going on from them; JSON.
    """

    settings: Mapping[str, Any]

    def run(self, job: "Job", units: Sequence[Unit]) -> None:
        """Measure the units; every row lands in the job's store."""
        ...


def make_runner(tokenizer: Any, planned: Sequence[PlannedTask], *, device: str, dtype: str,
                chunk: int | None, nproc: int | str, context_parallel: int,
                server: Server | None, others: Mapping[str, Any]) -> Runner:
    """The runner that the options ask for, after it has checked what it can.

    Args:
        others: options that a server has no use for, by name; None where they are not given.

    Raises:
        RecipeError: options that exclude one another.
        CompatibilityError: a device that is not there, or a server that cannot do what is asked.
        ServerError: a server that does not answer.
    """
    if server is not None:
        _refuse_beside_server({"nproc": None if nproc == 1 else nproc,
                               "context_parallel": None if context_parallel == 1 else
                               context_parallel, "chunk": chunk, **others})
        return ServerRunner.open(server, tokenizer, planned)
    settings = _resolve(device, dtype, chunk)
    if context_parallel == 1:
        return ProcessRunner(settings, nproc)
    if nproc != 1:
        raise RecipeError(f"nproc is {nproc} and context_parallel {context_parallel}; processes "
                          "either measure cells of their own or share each row, so leave one out")
    from extend.evaluate.ring_workers import count_ranks

    ranks = count_ranks(context_parallel, device)
    return RingRunner({**settings, "context_parallel": ranks}, ranks)


def _refuse_beside_server(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise RecipeError(f"{name} is {value} and server is given; a server runs one model in "
                              f"its own way, so leave {name} out (an adapter has a model name of "
                              "its own there)")


def _resolve(device: str, dtype: str, chunk: int | None) -> dict[str, Any]:
    """What `auto` means here: part of what the rows depend on."""
    from extend.evaluate.load import choose_chunk
    from extend.loading import choose_device, choose_dtype

    chosen = choose_device(device)
    return {"device": chosen.type, "chunk": choose_chunk(chunk, chosen),
            "dtype": str(choose_dtype(dtype, chosen)).removeprefix("torch.")}


@dataclass(frozen=True)
class ProcessRunner:
    """Processes of this machine, each with cells of its own."""

    settings: Mapping[str, Any]
    nproc: int | str

    def run(self, job: "Job", units: Sequence[Unit]) -> None:
        from extend.evaluate.cells import score_units
        from extend.evaluate.workers import count_processes, score_in_processes

        processes = min(count_processes(self.nproc, job.device), max(1, len(units)))
        if processes == 1:
            score_units(job, units)
        else:
            score_in_processes(job, units, processes)


@dataclass(frozen=True)
class RingRunner:
    """Ranks that share each row."""

    settings: Mapping[str, Any]
    ranks: int

    def run(self, job: "Job", units: Sequence[Unit]) -> None:
        from extend.evaluate.ring_workers import score_on_ring

        score_on_ring(job, units, self.ranks)


@dataclass(frozen=True)
class ServerRunner:
    """A server that is asked for every cell."""

    settings: Mapping[str, Any]
    backend: "ServerBackend"

    @classmethod
    def open(cls, server: Server, tokenizer: Any,
             planned: Sequence[PlannedTask]) -> "ServerRunner":
        from extend.evaluate.backends.server import ServerBackend

        url, options = read_server(server)
        backend = ServerBackend.open(url, tokenizer, options)
        backend.check((entry.name, entry.task.measure, cell.length)
                      for entry in planned for cell in entry.cells)
        return cls({"device": None, "chunk": None, "dtype": None, "server": backend.identity},
                   backend)

    def run(self, job: "Job", units: Sequence[Unit]) -> None:
        from extend.evaluate.cells import score_with

        score_with(self.backend, job, units)


def read_server(server: Server) -> tuple[str, Any]:
    """Address and `ServerOptions` of an address, or of a mapping with `url` and the options.

    Raises:
        RecipeError: no address, or an option that there is not.
    """
    from extend.evaluate.backends.served import ServerOptions

    given = {"url": server} if isinstance(server, str) else dict(server)
    url, known = given.pop("url", None), ServerOptions.__dataclass_fields__
    if not isinstance(url, str) or not url:
        raise RecipeError(f"server: {server!r} has no url; write http://localhost:8000, or a "
                          "mapping with the key url")
    for key in given:
        if key not in known:
            raise RecipeError(f"server: unknown option {key!r};{suggest(key, known)} it accepts "
                              f"url, {', '.join(known)}")
    return url, ServerOptions(**given)
