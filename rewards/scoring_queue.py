"""A queue that scores one batch while the next one is sampled."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class ScoringQueue:
    """Run calls on one background thread, in the order of submission, without autocast and without gradients.

    An exception of a call is raised by its result and by the next `submit`; later calls do not run. The queue draws no
    random numbers, so results equal those of sequential calls.

    Args:
        ahead: Maximum number of calls that run or wait; `submit` blocks while there are more, so that images do not
            accumulate. With 0, calls run on the thread that submits them.
        device: Current CUDA device of the background thread; by default a new thread uses the first GPU.
    """

    def __init__(self, ahead: int = 2, device: str | torch.device = "cpu") -> None:
        self._room = threading.Semaphore(ahead)
        self._failure: BaseException | None = None
        self._thread: ThreadPoolExecutor | None = None
        if ahead:
            self._thread = ThreadPoolExecutor(
                1, thread_name_prefix="stepfuse-scoring", initializer=_set_device, initargs=(torch.device(device),)
            )

    def submit(self, call: Callable[[], Tensor]) -> "Future[Tensor]":
        """Submit a call and return the future of its result, or raise the exception of an earlier call."""
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
        """Cancel the calls that wait, and wait for the call that runs."""
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


def _set_device(device: torch.device) -> None:
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
