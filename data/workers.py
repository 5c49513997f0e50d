"""Worker processes: work side by side, none of them outliving the process that started them.

Owns processes only; what they do is the caller's function.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


class Workers:
    """Call a function in processes of their own, or in this one where there is one worker at most.

        with Workers(4) as workers:
            for item in items:
                workers.submit(function, item, done)
            workers.wait()

    Processes are spawned, not forked (a fork would copy the locks of whatever is loaded), and only
    as they are needed. They end with this process, also when it is killed.

    Parameters
    ----------
    count : processes; with 0 or 1 `submit` calls the function itself

    Raises
    ------
    OSError : in `submit` and `wait`, if a process was killed; what the function or `done` raised
        comes out there, too
    """

    def __init__(self, count: int):
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        self._room = threading.Semaphore(count + 1)  # one waits, so that no process ever does
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if self._pool is None:
            return
        if kind is None:
            self._pool.shutdown()
            return
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # what they do may take minutes
            process.terminate()

    def submit(self, function: Callable[[Any], Any], item: Any,
               done: Callable[[Any], None]) -> None:
        """Have `done(function(item))` called; waits while all workers have enough to do.

        `done` is called in whichever thread, one call at a time.
        """
        if self.count <= 1:
            done(function(item))
            return
        self._acquire()
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.count, multiprocessing.get_context("spawn"), end_with_parent)
        try:
            with _interrupts_ignored():
                future = self._pool.submit(function, item)
        except BrokenProcessPool as error:
            raise self._explain(error) from None
        future.add_done_callback(lambda finished: self._settle(finished, done))

    def wait(self) -> None:
        """Wait until all that was submitted is done."""
        if self._pool is None:
            return
        for _ in range(self.count + 1):
            self._acquire()
        for _ in range(self.count + 1):
            self._room.release()

    def _acquire(self) -> None:
        while not self._room.acquire(timeout=0.5):  # a bare acquire() is deaf to Ctrl-C on Windows
            pass
        if self._error:
            self._room.release()
            raise self._explain(self._error)

    def _settle(self, future: Future, done: Callable[[Any], None]) -> None:
        """Hand on a result; the executor would swallow what is raised here."""
        try:
            if not future.cancelled():
                with self._lock:
                    done(future.result())
        except BaseException as error:
            self._error = self._error or error
        finally:
            self._room.release()

    @staticmethod
    def _explain(error: BaseException) -> BaseException:
        if isinstance(error, BrokenProcessPool):
            return OSError("a worker process was killed, for want of memory as a rule; run again "
                           "with fewer --workers")
        return error


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Start processes that do not hear Ctrl-C, not even while they import; they inherit this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_with_parent() -> None:
    """Let this process end when its parent does, as nobody else would end it after a kill."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
