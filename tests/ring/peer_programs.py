"""Random programs for ranks that share memory, what each should receive, and a way to play them."""

import random
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch

from extend.ring.peer import PeerBuffers
from extend.ring.transfer import Arrival
from tests.ring.simulated_gpus import Gpu, Machine, Notes

MINUTE = timedelta(seconds=60)
ROWS = (2, 4, 7)  # of what is published; buffers grow now and then, and hold less afterwards


class Step(NamedTuple):
    """One line of the program that all ranks share."""

    kind: str
    lane: str = ""
    rows: int = 0
    pieces: tuple[tuple[int, slice], ...] = ()  # (how many places back, which rows)
    which: int = 0  # of the transfers under way


def make_program(seed, world):
    """Two lanes, published, fetched from, closed and waited for as chance has it; seldom closed."""
    chance, steps, rows, closed, under_way = random.Random(seed), [], {}, set(), 0
    for _ in range(18):
        lane = chance.choice("ab")
        fetching = lane in rows and lane not in closed
        kind = chance.choice(["publish", *["fetch", "fetch", "close"] * fetching,
                              *["wait"] * (under_way > 0)])  # fmt: skip
        if kind == "publish":
            rows[lane] = chance.choice(ROWS)
            closed.discard(lane)
            steps.append(Step("publish", lane, rows[lane]))
        elif kind == "fetch":
            owners = [chance.randrange(world) for _ in range(chance.randint(0, 4))]
            end = rows[lane]
            pieces = tuple((back, slice(chance.randrange(end), end)) for back in owners)
            steps.append(Step("fetch", lane, pieces=pieces))
            under_way += 1
        elif kind == "close":
            closed.add(lane)
            steps.append(Step("close", lane))
        else:
            steps.append(Step("wait", which=chance.randrange(under_way)))
            under_way -= 1
    return [*steps, *[Step("wait")] * under_way]


def number(rank, turn):
    """What is published: on no two ranks and in no two turns the same."""
    return 10 * turn + rank


def has_use(rank, owner, turn):
    """Some ranks fetch nothing from some owners, now and then from nobody."""
    return (rank + 2 * owner + turn) % 3 > 0


class Player:
    """What one rank's host enqueues.

    Memory is reused as early as is allowed: what is published as soon as it is, rooms as soon as
    the current stream has used what came into them.
    """

    def __init__(self, gpu, watchdog, ranks=None):
        self.gpu, self.rank, self.world = gpu, gpu.rank, len(gpu.machine.streams)
        self.peers = PeerBuffers(gpu, gpu.rank, ranks or tuple(range(self.world)), watchdog)
        self.source = torch.zeros(max(ROWS), 2)
        self.rooms = [torch.zeros(max(ROWS), 2) for _ in range(80)]
        self.offers, self.under_way, self.got = {}, [], {}

    def play(self, program):
        for turn, step in enumerate(program):
            getattr(self, step.kind)(turn, step)

    def publish(self, turn, step):
        part = self.source[: step.rows]
        self.gpu.issue(partial(self.source.fill_, number(self.rank, turn)))
        self.offers[step.lane] = self.peers.publish(
            step.lane, part.shape, part, lambda buffer: buffer.copy_(part), MINUTE
        )

    def fetch(self, turn, step):
        offer, arrivals, used = self.offers[step.lane], [], []
        for back, rows in step.pieces:
            owner = (self.rank - back) % self.world
            if has_use(self.rank, owner, turn):
                used.append(self.rooms.pop())
                self.gpu.issue(partial(used[-1].fill_, -1))
                arrivals.append(Arrival(owner, used[-1][rows], offer.view(owner)[rows]))
        self.under_way.append((turn, offer.fetch((), arrivals), arrivals, used))

    def close(self, turn, step):
        self.offers[step.lane].close()

    def wait(self, _, step):
        turn, transfer, arrivals, used = self.under_way.pop(step.which)
        transfer.wait()
        self.gpu.issue(lambda: self.got.update({turn: [a.into.clone() for a in arrivals]}))
        self.rooms += used


def wanted(program, rank, world):
    """What arrives in each turn, by the definition of fetching."""
    published, want = {}, {}
    for turn, step in enumerate(program):
        if step.kind == "publish":
            published[step.lane] = turn
        elif step.kind == "fetch":
            owners = [((rank - back) % world, rows) for back, rows in step.pieces]
            want[turn] = [
                torch.full((rows.stop - rows.start, 2), number(owner, published[step.lane]) + 0.0)
                for owner, rows in owners if has_use(rank, owner, turn)
            ]  # fmt: skip
    return want


def simulate(seed, gpu_class=Gpu, world=3):
    """Play one program in one order of events, and compare all that arrives."""
    program, machine = make_program(seed, world), Machine(world)
    players = [Player(gpu_class(machine, rank), Notes()) for rank in range(world)]
    for player in players:
        player.play(program)
    machine.run(random.Random(seed))
    for rank, player in enumerate(players):
        torch.testing.assert_close(player.got, wanted(program, rank, world), rtol=0, atol=0)
