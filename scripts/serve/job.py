"""A request while it is drawn: a run of the sampler that waits, at each step, for forwards it shares with others."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import greenlet
import torch
from torch import Tensor

from stepfuse.data.out_of_memory import is_out_of_memory
from stepfuse.fuse.backbones.denoiser import ForwardRows
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.scripts.serve.errors import RequestError, internal, out_of_memory

Draw = Callable[["Job"], Tensor]
LOG = logging.getLogger("stepfuse.serve")


class Stopped(Exception):
    """Raised where a run waits for a forward, once nobody waits for the run."""


@dataclass(eq=False, kw_only=True)
class Job:
    """One request.

    Attributes:
        draw: samples it, with `predict` for the network's forwards; returns pixels in [0, 1].
        images: that it draws.
        notify: called from the engine's thread with the steps done, the steps there are and the position in the queue.
        finish: called once from the engine's thread, with pixels or an error.
        client: the client that sent it, for turns in the queue.
        low: drawn only with what requests of normal priority leave.
        deadline: after which it is given up, by the monotonic clock.
    """

    draw: Draw
    images: int
    notify: Callable[[int, int, int], None]
    finish: Callable[[Tensor | BaseException], None]
    client: str = ""
    low: bool = False
    deadline: float = float("inf")
    since: float = field(default_factory=monotonic)
    started: float = 0.0
    position: int = 0  # in the queue, as it was told
    turn: int = 0  # of the last forward that it had rows in
    rows: int = 0  # of its last prediction; before the first one, its images
    cancelled: bool = False  # nobody waits for it
    given_up: bool = False  # the server stops, and it has had its time
    _run: greenlet.greenlet | None = None
    _todo: deque[tuple[int, ForwardRows]] = field(default_factory=deque)
    _done: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = self.images

    # In the run's greenlet.

    def predict(self, branches: Sequence[ForwardRows]) -> list[Latents]:
        """Wait for the raw predictions of branches."""
        if not branches:
            return []
        assert self._run is not None
        parent = self._run.parent
        assert parent is not None
        outputs: list[Latents] = parent.switch(list(branches))
        return outputs

    # In the engine's.

    def start(self) -> None:
        """Run to the first prediction that is waited for."""
        self.started = monotonic()
        self.tell_position(0)
        self._run = greenlet.greenlet(self._whole)
        self._resume(self._run.switch())

    def _whole(self) -> None:
        try:
            result: Tensor | BaseException = self.draw(self)
        except Stopped:
            return
        except Exception as error:
            result = self._answer_to(error)
        self.finish(result)

    def tell_position(self, position: int) -> None:
        if position != self.position:
            self.position = position
            self.notify(0, 0, position)

    def _answer_to(self, error: Exception) -> RequestError:
        if isinstance(error, RequestError):
            return error
        if is_out_of_memory(error):
            LOG.warning("out of memory outside of the network: %s", error)
            return out_of_memory()
        LOG.error("a request failed", exc_info=error)
        return internal()

    @property
    def is_over(self) -> bool:
        return self._run is not None and self._run.dead

    def stop(self, why: RequestError | None = None) -> None:
        """End the run where it waits; with an error that is told, if somebody is there to hear it."""
        if self._run is not None and not self._run.dead:
            self._run.throw(Stopped)
        self._todo.clear()
        self._done.clear()
        if why is not None:
            self.finish(why)

    def next_rows(self) -> Sequence[ForwardRows]:
        """The rows that are waited for, in order."""
        return [rows for _, rows in self._todo]

    def give(self, outputs: Sequence[Tensor]) -> None:
        """Predictions of the first rows that are waited for; a piece may be of some rows of the last one only."""
        for output in outputs:
            branch, rows = self._todo.popleft()
            self._done[branch].append(output)
            if len(output) < len(rows):
                self._todo.appendleft((branch, rows[len(output) :]))

    def resume(self) -> None:
        """Go on to the next prediction, or to the end, if everything that was waited for is there."""
        if self._todo or self._run is None or self._run.dead or not self._done:
            return
        outputs = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in self._done]
        self._done = []
        self._resume(self._run.switch(outputs))

    def _resume(self, asked: Any) -> None:
        if self._run is None or self._run.dead:
            return
        self._todo = deque(enumerate(asked))
        self._done = [[] for _ in asked]
        self.rows = sum(map(len, asked))
