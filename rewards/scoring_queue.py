"""Score one batch while the next is sampled."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class ScoringQueue:
    """Calls made by one thread, in the order they were asked for.

    A thread of its own has no autocast and, here, no gradient; what a call raises is raised where its result is asked
    for. Nothing random happens in it, so that numbers are those of calls made one after the other.

    Args:
        ahead: calls that may wait; asking for more waits, so that images do not pile up. With 0 this thread calls.
    """

    def __init__(self, ahead: int = 2) -> None:
        self._room = threading.Semaphore(ahead) if ahead else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stepfuse-scoring") if ahead else None

    def submit(self, call: Callable[[], Tensor]) -> "Future[Tensor]":
        """The result to be."""
        if self._thread is None or self._room is None:
            done: Future[Tensor] = Future()
            done.set_result(call())
            return done
        self._room.acquire()
        future = self._thread.submit(torch.no_grad()(call))
        future.add_done_callback(lambda _: self._room.release() if self._room else None)
        return future

    def close(self) -> None:
        """Drop what waits, and let the call that runs come to its end."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
