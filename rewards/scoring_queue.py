"""A queue that scores one batch while the next one is sampled."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from stepfuse.data.devices import without_autocast


class ScoringQueue:
    """Run calls on one background thread, in the order of submission, without autocast and without gradients.

    On a GPU the thread computes on a CUDA stream of its own, so that scores are computed beside what else the GPU does.
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
        self._device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        if ahead:
            self._thread = ThreadPoolExecutor(
                1, thread_name_prefix="stepfuse-scoring", initializer=_set_device, initargs=(self._device,)
            )
            if self._device.type == "cuda":
                self._stream = torch.cuda.Stream(self._device)

    def submit(self, call: Callable[[], Tensor], *read: Tensor) -> "Future[Tensor]":
        """Submit a call and return the future of its result, or raise the exception of an earlier call.

        Args:
            read: tensors that the call reads, computed by the thread that submits it.
        """
        if self._thread is None:
            done: Future[Tensor] = Future()
            done.set_result(self._compute(call))
            return done
        self._room.acquire()
        if self._failure is not None:
            self._room.release()
            raise self._failure
        if self._stream is not None:
            call = _on_stream(self._stream, call, read)
        return self._thread.submit(self._run, call)

    def close(self) -> None:
        """Cancel the calls that wait, and wait for the call that runs."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, call: Callable[[], Tensor]) -> Tensor:
        try:
            if self._failure is not None:
                raise self._failure
            return self._compute(call)
        except BaseException as error:
            self._failure = self._failure or error
            raise
        finally:
            self._room.release()

    def _compute(self, call: Callable[[], Tensor]) -> Tensor:
        # outside inference mode: a reward may be code of the user that computes gradients
        with torch.inference_mode(False), torch.no_grad(), without_autocast(self._device):
            return call()


def _on_stream(stream: torch.cuda.Stream, call: Callable[[], Tensor], read: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A call on this stream, which begins when all is done that the present stream of this thread has to do now.

    The thread that runs it waits for the stream, so that a result is there for every other stream when it is returned.
    """
    submitting = torch.cuda.current_stream(stream.device)
    ready = submitting.record_event()

    def run() -> Tensor:
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            for values in read:  # their memory is not used again before this stream has read them
                values.record_stream(stream)
            result = call()
            if result.is_cuda:
                result.record_stream(submitting)
        stream.synchronize()
        return result

    return run


def _set_device(device: torch.device) -> None:
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
