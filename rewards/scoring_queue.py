"""Score one batch while the next is sampled."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class ScoringQueue:
    """Calls made by one thread, in the order they were asked for.

    A thread of its own has no autocast and, here, no gradient. What a call raises is raised where its result is asked
    for, or by the next thing asked: after a failure nothing more is scored. Nothing random happens in it, so that
    numbers are those of calls made one after the other.

    Args:
        ahead: calls that run or wait at most; asking for more waits, so that images do not pile up. With 0 this thread
            calls.
        device: the thread's own; on a machine of several GPUs a new thread would begin with the first.
    """

    def __init__(self, ahead: int = 2, device: str | torch.device = "cpu") -> None:
        self._room = threading.Semaphore(ahead)
        self._failure: BaseException | None = None
        self._thread: ThreadPoolExecutor | None = None
        if ahead:
            self._thread = ThreadPoolExecutor(
                1, thread_name_prefix="stepfuse-scoring", initializer=_begin, initargs=(torch.device(device),)
            )

    def submit(self, call: Callable[[], Tensor]) -> "Future[Tensor]":
        """The result to be.

        Raises:
            Exception: what an earlier call raised.
        """
        if self._thread is None:
            done: Future[Tensor] = Future()
            done.set_result(call())
            return done
        self._room.acquire()
        if self._failure is not None:
            self._room.release()
            raise self._failure
        return self._thread.submit(self._run, call)

    def close(self) -> None:
        """Drop what waits, and let the call that runs come to its end."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    @torch.no_grad()
    def _run(self, call: Callable[[], Tensor]) -> Tensor:
        try:
            if self._failure is not None:
                raise self._failure
            return call()
        except BaseException as error:
            self._failure = self._failure or error
            raise
        finally:
            self._room.release()


def _begin(device: torch.device) -> None:
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
