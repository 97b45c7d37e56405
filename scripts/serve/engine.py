"""Step-level continuous batching: one thread that draws the images of all requests, one forward after the other.

Requests join and leave between forwards. Each is a run of its own, under its own rule, which waits for predictions;
the rows that all runs wait for go through the network together.
"""

import logging
import math
import threading
from collections.abc import Sequence
from time import monotonic

import torch
from accelerate.utils.memory import clear_device_cache

from stepfuse.data.out_of_memory import is_out_of_memory
from stepfuse.fuse.backbones.denoiser import ForwardRows
from stepfuse.fuse.sampling.shared_forwards import SharedForwards, split
from stepfuse.scripts.serve.errors import internal, late, out_of_memory, queue_full, stopping
from stepfuse.scripts.serve.fair_queue import FairQueue
from stepfuse.scripts.serve.host_memory import release_free_memory
from stepfuse.scripts.serve.job import Job
from stepfuse.scripts.serve.metrics import Metrics

LOG = logging.getLogger("stepfuse.serve")
RELEASE_SECONDS = 30  # between two times that freed memory is returned to the system
JOBS = 4  # that run together at least, however many rows each of them has
Chosen = list[tuple[Job, list[ForwardRows]]]


class Engine:
    """Draws jobs.

    Args:
        forwards: of the network that all jobs use.
        max_waiting: jobs of each priority that may wait; more are refused.
        max_per_client: those of one client.
    """

    def __init__(
        self, forwards: SharedForwards, *, metrics: Metrics, max_waiting: int, max_per_client: int | None = None
    ) -> None:
        self.forwards, self.metrics = forwards, metrics
        self.is_failing = False  # the last forward failed
        self._queues = {low: FairQueue[Job](max_waiting, max_per_client) for low in (False, True)}
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 1.0  # of a job from its start to its end: an exponential moving average
        self._turn = 0
        self._released = monotonic()
        self._thread = threading.Thread(target=self._loop, name="stepfuse-engine", daemon=True)

    # Of any thread.

    def start(self) -> None:
        self._thread.start()

    @property
    def is_stopping(self) -> bool:
        return self._stopping

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Queue a job; a `RequestError` where the server is stopping, or the queue is full."""
        with self._changed:
            if self._stopping:
                raise stopping()
            queue = self._queues[job.low]
            if queue.is_full(job.client):
                expected = self._seconds * len(queue) / max(1, len(self._running)) / 2
                raise queue_full(len(queue), max(1, math.ceil(expected)))
            queue.put(job.client, job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Give up a job that nobody waits for."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def refuse(self) -> None:
        """Refuse new jobs; those there are go on."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop(self, *, seconds: float = math.inf) -> None:
        """Refuse new jobs, wait for those there are, and end; after so many seconds give up what is left."""
        self.refuse()
        self._thread.join(None if math.isinf(seconds) else seconds)
        if self._thread.is_alive():
            with self._changed:
                for job in self._jobs():
                    job.given_up = True
                self._changed.notify()
            self._thread.join()

    # Of the engine's thread.

    def _jobs(self) -> list[Job]:
        return [*self._queues[False], *self._queues[True], *self._running]

    def _loop(self) -> None:
        with torch.no_grad():
            while True:
                with self._changed:
                    while not (self._running or self.waiting or self._stopping):
                        self._changed.wait()
                    self._drop()
                    starting = self._admitted()
                    self._tell_positions()
                if self._stopping and not (self._running or self.waiting):
                    return
                try:
                    for job in starting:
                        job.start()
                    self._remove_finished()
                    self._step()
                except Exception as error:  # the thread goes on, or nothing would ever be answered again
                    LOG.error("the engine failed", exc_info=error)
                    self._end_all()
                self.metrics.state(waiting=self.waiting, running=len(self._running))
                if monotonic() - self._released > RELEASE_SECONDS:
                    release_free_memory()
                    self._released = monotonic()

    def _drop(self) -> None:
        """Stop what is cancelled, late or given up."""
        now = monotonic()
        for job in self._jobs():
            if not (job.cancelled or job.given_up or now > job.deadline):
                continue
            waited = self._queues[job.low].remove(job)
            if not waited:
                self._running.remove(job)
            why = stopping() if job.given_up else late(job.deadline - job.since, begun=not waited)
            job.stop(None if job.cancelled else why)

    def _end_all(self) -> None:
        """End every job after a fault that is none of theirs."""
        self.is_failing = True
        with self._changed:
            jobs, self._running = self._jobs(), []
            for job in jobs:
                self._queues[job.low].remove(job)
                job.stop(internal())

    def _admitted(self) -> list[Job]:
        """Jobs whose turn it is: as many as fill a forward, several however large, and of low priority where none
        waits.
        """
        starting = []
        most = self.forwards.max_rows
        for low, queue in self._queues.items():
            rows = sum(min(job.rows, max(1, most // JOBS)) for job in self._running if low or not job.low)
            while len(queue) and rows < most:
                job = queue.take()
                rows += min(job.rows, max(1, most // JOBS))
                job.turn = self._turn
                self._running.append(job)
                starting.append(job)
        return starting

    def _tell_positions(self) -> None:
        for queue in self._queues.values():
            for position, job in enumerate(queue, 1):
                job.tell_position(position)

    def _step(self) -> None:
        """One forward of the rows that are waited for, and on with the runs whose predictions are there."""
        order = sorted((job for job in self._running if job.next_rows()), key=lambda job: (job.low, job.turn))
        if not order:
            return
        chosen = self._chosen(order)
        pieces = [rows for _, some in chosen for rows in some]
        count, begin = sum(map(len, pieces)), monotonic()
        try:
            forward = self.forwards.run(pieces)
        except Exception as error:
            self._failed(error, [job for job, _ in chosen], pieces[0], count)
            return
        self.is_failing = False
        self.metrics.forward(rows=count, padding=forward.padding, seconds=monotonic() - begin)
        self._turn += 1
        outputs = iter(split(forward.outputs, pieces))
        for job, some in chosen:
            job.turn = self._turn
            job.give([next(outputs) for _ in some])
        del forward, pieces, outputs
        for job, _ in chosen:
            job.resume()
        self._remove_finished()

    def _chosen(self, order: Sequence[Job]) -> Chosen:
        """Rows of one shape, those that have waited longest first; low priority takes what normal ones leave.

        Beside rows of normal priority, those of low priority only take the rows that would be padding.
        """
        first = order[0].next_rows()[0]
        shapes, room = self.forwards.shapes(first), self.forwards.largest(first)
        chosen: Chosen = []
        taken = 0
        for job in order:
            if job.low and not order[0].low and not (chosen and chosen[-1][0].low):  # the first of low priority
                room = self.forwards.count_for(first, taken) - taken
            some = []
            for rows in job.next_rows():
                if room == 0 or self.forwards.shapes(rows) != shapes:
                    break
                some.append(rows[:room] if len(rows) > room else rows)
                room -= len(some[-1])
                taken += len(some[-1])
            if some:
                chosen.append((job, some))
        return chosen

    def _failed(self, error: Exception, jobs: Sequence[Job], first: ForwardRows, rows: int) -> None:
        """After a forward that failed: smaller ones where the memory was too small, else an end of these jobs."""
        if is_out_of_memory(error) and rows > 1:
            self.forwards.limit(first, rows // 2)
            LOG.warning("out of memory with %d rows; from now on at most %d of this shape", rows, rows // 2)
        else:
            LOG.error("a forward of %d rows failed", rows, exc_info=error)
            self.is_failing = not is_out_of_memory(error)
            for job in jobs:
                self._running.remove(job)
                job.stop(out_of_memory() if is_out_of_memory(error) else internal())
        error.__traceback__ = None  # its frames hold the tensors
        clear_device_cache(garbage_collection=True)

    def _remove_finished(self) -> None:
        for job in [job for job in self._running if job.is_over]:
            self._running.remove(job)
            self._seconds += 0.1 * (monotonic() - job.started - self._seconds)
