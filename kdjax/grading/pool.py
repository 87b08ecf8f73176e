"""Workers that can be killed: each request has a deadline, and a worker that misses it is replaced.

A worker is a fresh process of a program (never a fork of this one, whose threads and devices it
must not inherit) that answers a JSON line with a JSON line, as `program.serve` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from kdjax.errors import ConfigError

BOOT_SECONDS = 120.0
BOOTS_THAT_MAY_FAIL = 3
ANSWERS_A_WORKER = 10_000  # then it is replaced: libraries' caches grow


class Reply(NamedTuple):
    """What a program made of a request, or why there is nothing: deadline, crash (twice), memory,
    or the name of an exception."""

    value: Any
    failure: str = ""


class _Worker:
    """A process, what it has said of its next line, and the request that it is busy with."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None):
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal reaches the parent alone
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.said = b""
        self.ready = False
        self.request: int | None = None
        self.answers = 0
        self.due = time.monotonic() + BOOT_SECONDS

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.requests, self.replies):
            with contextlib.suppress(OSError):  # what was not yet written is lost anyhow
                pipe.close()
        self.process.wait()


class _Asked(NamedTuple):
    """What a call of `map` was asked: the requests, the numbers of those that wait, the replies by
    number, and the numbers of those that have lost a worker."""

    requests: Sequence[dict[str, Any]]
    waiting: deque[int]
    replies: dict[int, Reply]
    again: set[int]


class Workers:
    """`map` gives requests to `count` processes of a command; `close` leaves none behind.

    Memory is the program's own to limit; its environment is this process's, where none is given. A
    worker lives until it fails, is late, has answered 10,000 requests, or this object or
    interpreter ends.
    """

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        deadline_seconds: float,
        environment: dict[str, str] | None = None,
    ):
        self._command, self._count, self._deadline_seconds = command, count, deadline_seconds
        self._environment = environment
        self._workers: list[_Worker] = []
        self._failed_boots = 0
        self.close = weakref.finalize(self, _kill_all, self._workers)  # also when Python ends

    def map(self, requests: Sequence[dict[str, Any]]) -> list[Reply]:
        """The reply to each request, in order. Errors: ConfigError when no worker starts."""
        if not self.close.alive:
            raise ValueError("Workers.map: these workers are closed; open new ones")
        asked = _Asked(requests, deque(range(len(requests))), {}, set())
        replies = asked.replies
        try:
            while len(replies) < len(requests):
                self._fill(min(self._count, len(requests) - len(replies)))
                self._deal(asked)
                self._collect(asked)
        except BaseException:  # Ctrl-C too: whatever is busy has lost its place
            for worker in list(self._workers):
                self._drop(worker)
            raise
        return [replies[number] for number in range(len(requests))]

    def _fill(self, wanted: int) -> None:
        while len(self._workers) < wanted:
            if self._failed_boots >= BOOTS_THAT_MAY_FAIL:
                raise ConfigError(
                    f"a worker ended {self._failed_boots} times before it was ready; give"
                    f" it more memory, or run it by hand: {' '.join(self._command)} < /dev/null"
                )
            self._workers.append(_Worker(self._command, self._environment))

    def _deal(self, asked: _Asked) -> None:
        for worker in self._workers:
            if asked.waiting and worker.ready and worker.request is None:
                worker.request = asked.waiting.popleft()
                worker.due = time.monotonic() + self._deadline_seconds
                line = json.dumps(asked.requests[worker.request]).encode() + b"\n"
                with contextlib.suppress(BrokenPipeError):  # its end is seen by _collect
                    worker.requests.write(line)
                    worker.requests.flush()

    def _collect(self, asked: _Asked) -> None:
        """Wait for the next reply, end or deadline of any worker, and take all that came."""
        busy = [w for w in self._workers if w.request is not None or not w.ready]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            soonest = min(worker.due for worker in busy)
            found = selector.select(max(0.0, soonest - time.monotonic()))
        for key, _ in found:
            self._hear(key.data, asked)
        for worker in busy:
            late = worker.request is not None or not worker.ready
            if worker in self._workers and late and time.monotonic() >= worker.due:
                self._lose(worker, "deadline", asked)

    def _hear(self, worker: _Worker, asked: _Asked) -> None:
        heard = os.read(worker.replies.fileno(), 65_536)
        worker.said += heard
        if not heard:
            self._lose(worker, "crash", asked)
        elif worker.said.endswith(b"\n"):
            fields = json.loads(worker.said)
            worker.said = b""
            if not worker.ready:
                worker.ready, self._failed_boots = True, 0
                return
            if worker.request is not None:
                asked.replies[worker.request] = Reply(
                    fields.get("value"), fields.get("failure", "")
                )
            worker.request, worker.answers = None, worker.answers + 1
            if fields.get("failure") == "memory" or worker.answers >= ANSWERS_A_WORKER:
                self._drop(worker)

    def _lose(self, worker: _Worker, failure: str, asked: _Asked) -> None:
        request = worker.request
        if request is not None and failure == "crash" and request not in asked.again:
            asked.again.add(request)  # who ended the worker may have been another
            asked.waiting.appendleft(request)
        elif request is not None:
            asked.replies[request] = Reply(None, failure)
        elif not worker.ready:
            self._failed_boots += 1
        self._drop(worker)

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
