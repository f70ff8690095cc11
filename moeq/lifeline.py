"""The end of one rank is the end of all: a connection from every rank to the first one, which says who failed first.

Collectives alone do not end a run.  A rank that waits in one for another that is gone waits for the limit of the
process group, here half a day, or ends with an error of the transport, which hides the one that matters.

1. A rank that fails says so before it lets go of anything, and goes on when the first rank has passed it on.  It then
   ends as one process alone would: with its error and a non-zero exit.
2. The others end without a word, exit code 1, once it is gone.  So whatever they ran into because of it is not shown,
   and a launcher that watches processes sees the one that failed first.
3. A rank that is gone without having said so (the kernel closes its connection, whatever ended it) is named by one
   rank of each node; that the first rank itself is gone the others notice in the same way.

Errors of another node's rank are repeated once on each node, whose terminal or log would not show them.
"""

import json
import os
import secrets
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import Condition, Thread
from typing import Any, NoReturn, TextIO

JOIN_SECONDS = 60.0  # for the connections at the start
GONE_SECONDS = 1.0  # for the end of a process to be noticed everywhere
LEAVE_SECONDS = 30.0  # for a rank that failed to write its error and end


@dataclass(frozen=True)
class Place:
    """Where a process of a run is.

    Attributes:
        rank: Among all.
        node: Of its machine.
        local_rank: Among those of its machine.
    """

    rank: int
    node: int
    local_rank: int


@dataclass(frozen=True)
class Failure:
    """Who failed first; the error is None where it was gone without a word."""

    place: Place
    error: str | None

    def message(self, reader: Place) -> str | None:
        """What a process has to write about it: once on each node, and nothing where the one that failed wrote."""
        same_node = self.place.node == reader.node  # where its own error is to be seen
        speaker = 1 if same_node and self.place.local_rank == 0 else 0
        if reader.local_rank != speaker or (same_node and self.error is not None):
            return None
        if self.error is not None:
            return f"moeq: rank {self.place.rank} failed: {self.error}"
        return (
            f"moeq: rank {self.place.rank} was killed, as the system does where memory runs out; "
            "the others end with it, and the same command goes on after the last finished part"
        )


class Lifeline(ABC):
    """One rank's end of the connections.

    Args:
        place: Of this process.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._changed = Condition()
        self._failure: Failure | None = None
        self._closed = False

    def fail(self, error: str) -> None:
        """Tell all ranks; returns where no other failed before, and else ends this process."""
        # The launcher of forked ranks ends the others itself, by signals that would break the silence.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        with self._changed:
            if not self._closed:
                with suppress(OSError):  # the first rank is gone: the thread that listens to it ends this process
                    self._tell(Failure(self.place, error))
                self._changed.wait_for(lambda: self._closed or self._failure is not None, JOIN_SECONDS)
            others = self._failure is not None and self._failure.place != self.place
        if others:
            time.sleep(3 * LEAVE_SECONDS)  # the thread that listens ends this process before
        for number, handler in before.items():
            signal.signal(number, handler)

    def close(self) -> None:
        """Leave in good order; does nothing after a failure, which ends with the process."""
        with self._changed:
            if not self._closed and self._failure is None:
                self._closed = True
                with suppress(OSError):
                    self._leave()

    @abstractmethod
    def _tell(self, failure: Failure) -> None:
        """Pass a failure of this rank on."""

    @abstractmethod
    def _leave(self) -> None:
        """Say that this rank has nothing more to fail at."""

    def _learn(self, failure: Failure) -> None:
        """Take note of the first failure, and write what this process has to write about it."""
        self._failure = failure
        if message := failure.message(self.place):
            sys.stderr.write(f"{message}\n")
            sys.stderr.flush()

    def _end(self) -> NoReturn:
        """End this process because of another's failure."""
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(1)  # the main thread waits in a collective, from which no exception gets it out


class _OfFirstRank(Lifeline):
    """Holds the connections of all others, and decides who failed first."""

    def __init__(self, place: Place, connections: dict[Place, socket.socket]) -> None:
        super().__init__(place)
        self._connections = connections
        self._left: set[Place] = set()
        for other, connection in connections.items():
            _start(lambda other=other, connection=connection: self._listen(other, connection))

    def _tell(self, failure: Failure) -> None:
        """Decide that this was the first failure, unless there was one; the lock is held."""
        if failure.error is not None:  # an error may be all that is seen yet of a rank that is gone
            self._changed.wait_for(lambda: self._failure is not None, GONE_SECONDS)
        if self._failure is None and not self._closed:
            self._learn(failure)
            for connection in self._connections.values():
                with suppress(OSError):
                    _send(connection, asdict(failure))
            if failure.place != self.place:
                _start(lambda: self._end_after(failure.place))
        self._changed.notify_all()

    def _listen(self, other: Place, connection: socket.socket) -> None:
        for message in _messages(connection):
            with self._changed:
                if "error" in message:
                    self._tell(Failure(other, message["error"]))
                else:
                    self._left.add(other)
        with self._changed:
            if other not in self._left:
                self._tell(Failure(other, None))
            self._left.add(other)
            self._changed.notify_all()

    def _end_after(self, failed: Place) -> NoReturn:
        """End last: after the rank that failed, and after the others."""
        with self._changed:
            self._changed.wait_for(lambda: failed in self._left, LEAVE_SECONDS)
            for connection in self._connections.values():
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)  # the sign to end
            self._changed.wait_for(lambda: self._left == self._connections.keys(), LEAVE_SECONDS)
        self._end()

    def _leave(self) -> None:
        for connection in self._connections.values():
            with suppress(OSError):
                _send(connection, {})


class _OfOtherRank(Lifeline):
    """Holds one connection, to the first rank."""

    def __init__(self, place: Place, connection: socket.socket) -> None:
        super().__init__(place)
        self._connection = connection
        _start(self._listen)

    def _tell(self, failure: Failure) -> None:
        _send(self._connection, {"error": failure.error})

    def _listen(self) -> None:
        for message in _messages(self._connection):
            with self._changed:
                if not message:  # the first rank has finished
                    self._closed = True
                else:
                    self._learn(Failure(Place(**message["place"]), message["error"]))
                self._changed.notify_all()
        with self._changed:
            if self._closed or (self._failure is not None and self._failure.place == self.place):
                return
            if self._failure is None:
                self._learn(Failure(Place(0, 0, 0), None))
        self._end()

    def _leave(self) -> None:
        _send(self._connection, {})


def open_lifeline(place: Place, world_size: int, host: str, broadcast: Callable[[Any], Any]) -> Lifeline:
    """Connect all ranks; every one must call this.

    Args:
        place: Of this process.
        world_size: Number of ranks.
        host: Name or address of the first rank's machine, as all others reach it.
        broadcast: Gives every rank what the first one passes.

    Raises:
        TimeoutError: A rank did not come, or the first rank was not reached.
    """
    if place.rank:
        port, token = broadcast(None)
        connection = socket.create_connection((host, port), timeout=JOIN_SECONDS)
        connection.settimeout(None)
        _send(connection, {"token": token, **asdict(place)})
        return _OfOtherRank(place, connection)
    with _listener(host) as listener:
        token = secrets.token_hex()  # the port is open to whoever finds it
        broadcast((listener.getsockname()[1], token))
        connections: dict[Place, socket.socket] = {}
        while len(connections) < world_size - 1:
            connection, _ = listener.accept()
            connection.settimeout(JOIN_SECONDS)
            hello = next(_messages(connection), {})
            if hello.pop("token", None) == token:
                connection.settimeout(None)
                connections[Place(**hello)] = connection
    return _OfFirstRank(place, connections)


def _listener(host: str) -> socket.socket:
    """A port of this machine; one that others cannot reach where the host's name is this machine's to itself."""
    if host in ("localhost", "127.0.0.1"):
        listener = socket.create_server(("127.0.0.1", 0))
    elif socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", 0))
    listener.settimeout(JOIN_SECONDS)
    return listener


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _messages(connection: socket.socket) -> Any:
    """Messages of the other end until it closes the connection, in whatever way."""
    stream: TextIO
    with suppress(OSError, ValueError), connection.makefile("r", encoding="utf8") as stream:
        for line in stream:
            yield json.loads(line)


def _start(work: Callable[[], None]) -> None:
    """In a thread that keeps no process alive."""
    Thread(target=work, name="lifeline", daemon=True).start()
