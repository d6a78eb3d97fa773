"""Threads for work that waits for a network or a disk. They never keep the process from ending.

Ours, since concurrent.futures waits for its threads: with eight that slept for 10 s Ctrl-C took 9.2 s, and 1 s here.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

SECONDS_TO_END = 1.0
Item = TypeVar("Item")
Result = TypeVar("Result")


class Stopped(Exception):
    """Ends work whose result nobody waits for any more."""


class Threads:
    """`count` threads; a context manager. stopping: set when the block is left, for long work to look at.

    concurrent.futures would wait for its threads at the end of the process: after Ctrl-C as long as a read that gets
    no answer lasts.
    """

    def __init__(self, count: int) -> None:
        self.stopping = threading.Event()
        self._tasks: SimpleQueue[tuple[Future, Callable, Any] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yields function(item) in the order of the items; of these no more are taken ahead than there are threads."""
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(self._submit(function, item))
            if len(waiting) == len(self._threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def call(self, function: Callable[[], Result], seconds: float) -> Result:
        """function(). Raises TimeoutError where it takes longer, and leaves it to its thread."""
        return self._submit(lambda _: function(), None).result(seconds)

    def run_all(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """function(item) of all items. Raises what the first of them to fail raises, and waits for no other then."""
        futures = [self._submit(function, item) for item in items]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return [future.result() for future in futures]

    def _submit(self, function: Callable[[Item], Result], item: Item) -> Future:
        future: Future = Future()
        self._tasks.put((future, function, item))
        return future

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None and not self.stopping.is_set():
            future, function, item = task
            try:
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *failure: object) -> None:
        self.stopping.set()
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + SECONDS_TO_END
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
