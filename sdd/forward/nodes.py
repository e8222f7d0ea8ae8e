"""The commands of several machines at one job: the first builds and holds the locks, the others lend it their devices.

Every machine runs the same command, with `MASTER_ADDR`, `MASTER_PORT` and `NODE_RANK` in its environment; in a step of
Slurm's, Slurm says so much. They meet at that address, where the first says which stages are begun and where their
ranks (`ranks.py`) meet. What is said are names, numbers and lines of text in JSON: nobody runs what another sends. A
connection ends with its process, so that all notice at once where one is gone. Knows nothing of what is computed.
"""

import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from sdd.errors import UserError

COMING = 600.0
"""Seconds that commands wait for the others to come."""
AGAIN = 0.5
"""Seconds until a node tries again to reach the first."""
HELLO = 10.0
"""Seconds in which one that came says who it is."""
LARGEST = 1 << 20
"""Bytes of what one says to another."""
SILENT = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""A machine that is cut off, and closes nothing, is given up after 30 seconds: Linux asks for it."""


class Elsewhere(UserError):
    """What ended another node's command ends this one."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Place:
    """One of `nodes` machines, with as many ranks as `devices` each; the first is found at `address` and `port`."""

    address: str
    port: int
    node: int
    nodes: int
    devices: int


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


# ---- what the environment says ----------------------------------------------------------------------------------


def place(nodes: int, devices: int, environment: Mapping[str, str] = os.environ) -> Place:
    """Which of so many nodes this is; a user's error where the environment does not say, or says otherwise."""
    given = {**_of_slurm(environment, nodes), **environment}
    given.setdefault("NODE_RANK", given.get("GROUP_RANK", ""))
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        if not given.get(name):
            raise UserError(
                f"trainer.num_nodes={nodes}: the command runs once on every machine, with MASTER_ADDR, MASTER_PORT and "
                f"NODE_RANK in the environment; {name} is missing here"
            )
    port, node = (_number(given, name) for name in ("MASTER_PORT", "NODE_RANK"))
    if not 0 < port < 1 << 16:
        raise UserError(f"MASTER_PORT={port} is no port")
    if node >= nodes:
        raise UserError(f"NODE_RANK={node}, but trainer.num_nodes={nodes}: the last node is {nodes - 1}")
    if given.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise UserError("LOCAL_WORLD_SIZE: one command a machine starts a process for each of its trainer.devices")
    if "WORLD_SIZE" in given and (size := _number(given, "WORLD_SIZE")) not in (nodes, nodes * devices):
        raise UserError(f"WORLD_SIZE={size}, but trainer.num_nodes={nodes} and trainer.devices={devices}")
    taken = given.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun listens there itself
    return Place(given["MASTER_ADDR"], port + taken, node, nodes, devices)


def _number(given: Mapping[str, str], name: str) -> int:
    if not given[name].isdecimal():
        raise UserError(f"{name}={given[name]} is no whole number")
    return int(given[name])


def _of_slurm(environment: Mapping[str, str], nodes: int) -> dict[str, str]:
    """What Slurm says of a step (`srun`) that has one task a node, as Lightning reads it."""
    if "SLURM_NODEID" not in environment or "SLURM_NTASKS" not in environment:
        return {}
    for name in ("SLURM_NNODES", "SLURM_NTASKS"):
        if (number := environment.get(name, str(nodes))) != str(nodes):
            raise UserError(f"{name}={number}, but trainer.num_nodes={nodes}, with one task a node")
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    hosts = environment.get("SLURM_JOB_NODELIST", environment.get("SLURM_NODELIST", ""))
    return {
        "MASTER_ADDR": SLURMEnvironment.resolve_root_node_address(hosts),
        "MASTER_PORT": str(15_000 + int(environment.get("SLURM_JOB_ID", "0")[-4:])),  # Lightning's rule
        "NODE_RANK": environment["SLURM_NODEID"],
    }


# ---- the commands together --------------------------------------------------------------------------------------


class Nodes:
    """The other commands, as one of them has them: the first all others, and each of these the first."""

    def __init__(self, place: Place, others: Mapping[int, Connection]) -> None:
        self.place, self.others = place, dict(others)
        self.said: dict[int, deque[list[Any]]] = {node: deque() for node in others}
        self.port = 0
        """Where the ranks of the stage that is under way meet."""

    @property
    def is_first(self) -> bool:
        return self.place.node == 0

    def look(self, patience: float | None = 0) -> None:
        """Take what the others have said, after so many seconds at most (None: when one says something); one that has
        failed or is gone ends this command."""
        for connection in wait(list(self.others.values()), patience):
            node = next(node for node, one in self.others.items() if one is connection)
            try:
                word = json.loads(connection.recv_bytes(LARGEST))  # type: ignore[union-attr]
            except (OSError, EOFError, ValueError):
                raise self._gone(node) from None
            if word[0] == "failed":
                raise Elsewhere(int(word[1]), str(word[2]))
            self.said[node].append(word)

    def agree(self, wanted: str, missing: list[str]) -> list[str]:
        """What the first node finds missing; all have to be asked for the same."""
        if self.is_first:
            self._say("asked", wanted, missing)
            for node in self.others:
                self._hear("agreed", node)
            return missing
        _, other, missing = self._hear("asked")
        if other != wanted:
            raise UserError(
                f"node {self.place.node} is asked for {wanted}, and node 0 for {other}: every node runs the same "
                "command on the same files"
            )
        self._say("agreed")
        return missing

    def begin(self, stage: str) -> None:
        """The first node's: say that a stage begins, and where its ranks meet. The others have been told by then."""
        if self.is_first:
            self.port = free_port()
            self._say("stage", stage, self.port)

    def finish(self) -> None:
        """Wait until the ranks of all nodes are through the stage."""
        if not self.is_first:
            self._say("done")
            return
        for node in self.others:
            self._hear("done", node)

    def stages(self) -> Iterator[str]:
        """What the first node begins, until it has all that it was asked for."""
        while (word := self._hear("stage", or_else="end"))[0] == "stage":
            _, stage, self.port = word
            yield stage

    def _hear(self, kind: str, node: int = 0, or_else: str = "") -> list[Any]:
        while not self.said[node]:
            self.look(None)
        word = self.said[node].popleft()
        if word[0] not in (kind, or_else):
            raise UserError(f"node {node} is at another job ({word[0]}, not {kind}): every node runs the same command")
        return word

    def _say(self, *word: Any) -> None:
        for node, connection in self.others.items():
            try:
                connection.send_bytes(json.dumps(word).encode())
            except OSError:
                self.look()  # it may have said why it ended
                raise self._gone(node) from None

    def _gone(self, node: int) -> Elsewhere:
        return Elsewhere(
            2,
            f"the command on node {node} of trainer.num_nodes={self.place.nodes} is gone (killed, or cut off); the "
            "same commands go on from what is there",
        )

    def ended(self, code: int, reason: str = "") -> None:
        """Say how this command ended, to those that are still there: with an exit code of 0, that all is built."""
        for connection in self.others.values():
            try:
                word = ("failed", code, reason) if code else ("end",)
                if code or self.is_first:
                    connection.send_bytes(json.dumps(word).encode())
            except OSError:
                continue

    def close(self) -> None:
        for connection in self.others.values():
            connection.close()


@contextmanager
def together(place: Place, explained: Callable[[BaseException], tuple[int, str]]) -> Iterator[Nodes]:
    """The commands of all nodes, once all have come; what ends this one (`explained`: exit code, line) ends all."""
    nodes = Nodes(place, dict(_come(place) if place.node == 0 else _reached(place)))
    try:
        yield nodes
        nodes.ended(0)
    except Exception as error:
        nodes.ended(*explained(error))
        raise
    finally:
        nodes.close()


def _come(place: Place) -> Iterable[tuple[int, Connection]]:
    """The connections of the other nodes, as each has said which it is."""
    others: dict[int, Connection] = {}
    deadline = time.monotonic() + COMING
    try:
        listening = socket.create_server(("", place.port), backlog=place.nodes)
    except OSError as error:
        raise UserError(f"MASTER_PORT={place.port} cannot be used here: {error.strerror}") from None
    with listening:
        while len(others) < place.nodes - 1:
            listening.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                came, _ = listening.accept()
            except TimeoutError:
                late = sorted({*range(1, place.nodes)} - others.keys())
                raise UserError(
                    f"trainer.num_nodes={place.nodes}: node {', '.join(map(str, late))} did not come to port "
                    f"{place.port} within {COMING:.0f} seconds; run the same command there"
                ) from None
            connection = _kept(came)
            try:
                if not connection.poll(HELLO):
                    continue
                node, nodes, devices = map(int, json.loads(connection.recv_bytes(LARGEST)))
            except (OSError, EOFError, ValueError, TypeError):
                continue  # a stranger
            if (nodes, devices) == (place.nodes, place.devices) and 0 < node < nodes and node not in others:
                others[node] = connection
                continue
            told = f"trainer.num_nodes={nodes} and trainer.devices={devices}"
            reason = f"node {node} says {told}, node 0 {place.nodes} and {place.devices}: the same on every node"
            if node in others:
                reason = f"two commands say NODE_RANK={node}; each node has its own"
            for one in (connection, *others.values()):
                one.send_bytes(json.dumps(("failed", 2, reason)).encode())
            raise UserError(reason)
    for connection in others.values():
        connection.send_bytes(b'["welcome"]')
    return others.items()


def _reached(place: Place) -> Iterable[tuple[int, Connection]]:
    """The connection to the first node, once all have come to it."""
    deadline, word = time.monotonic() + COMING, [""]
    while time.monotonic() < deadline:
        try:
            connection = _kept(socket.create_connection((place.address, place.port), HELLO))
            connection.send_bytes(json.dumps((place.node, place.nodes, place.devices)).encode())
            if connection.poll(max(0.0, deadline - time.monotonic())):
                word = json.loads(connection.recv_bytes(LARGEST))
        except socket.gaierror as error:
            raise UserError(f"MASTER_ADDR={place.address} is unknown here: {error.strerror}") from None
        except (OSError, EOFError):  # not there yet, or it was about to go
            time.sleep(AGAIN)
            continue
        if word[0] == "failed":
            raise Elsewhere(int(word[1]), str(word[2]))
        if word[0] == "welcome":
            return [(0, connection)]
    raise UserError(
        f"trainer.num_nodes={place.nodes}: node 0 was not met at {place.address}:{place.port} (MASTER_ADDR, "
        f"MASTER_PORT) within {COMING:.0f} seconds; run the same command on every node"
    )


def _kept(one: socket.socket) -> Connection:
    """A connection that notices where the other side is cut off."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in SILENT.items():
        if hasattr(socket, name):  # Linux has them
            one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    one.settimeout(None)
    return Connection(one.detach())
