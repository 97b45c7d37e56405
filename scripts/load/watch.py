"""Memory, threads and open files of a server while it is under load."""

import statistics
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A process at a time, in seconds since the beginning of the load."""

    seconds: float
    rss_mb: float
    threads: int
    files: int


@dataclass(kw_only=True)
class Watch:
    """Samples of a process every few seconds."""

    process: psutil.Process
    every: float
    begin: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)

    def sample(self) -> Sample:
        with self.process.oneshot():
            return Sample(
                seconds=round(time.monotonic() - self.begin, 1),
                rss_mb=round(self.process.memory_info().rss / 1e6, 1),
                threads=self.process.num_threads(),
                files=self.process.num_fds(),
            )

    def run(self, end: threading.Event) -> None:
        while not end.wait(self.every):
            self.samples.append(self.sample())

    def fifth(self, number: int, of: str) -> float:
        """The mean in one of five equal parts of the time, from 0."""
        size = len(self.samples) / 5
        part = self.samples[int(number * size) : int((number + 1) * size)]
        return statistics.fmean(getattr(each, of) for each in part)

    def summary(self) -> dict[str, Any]:
        """Means of the second and of the last fifth, and all samples."""
        if len(self.samples) < 5:
            return {"series": [asdict(each) for each in self.samples]}
        means = {of: [self.fifth(1, of), self.fifth(4, of)] for of in ("rss_mb", "threads", "files")}
        return {"second_and_last_fifth": means, "series": [asdict(each) for each in self.samples]}

    def grown(self, *, share: float) -> list[str]:
        """What has grown from the second to the last fifth: the memory by more than a share, threads, open files."""
        if len(self.samples) < 5:
            return []
        wrong = []
        before, after = self.fifth(1, "rss_mb"), self.fifth(4, "rss_mb")
        if after > (1 + share) * before:
            wrong.append(f"the memory has grown from {before:.1f} to {after:.1f} MB")
        for of in ("threads", "files"):  # which vary with the number of requests
            before, after = self.fifth(1, of), self.fifth(4, of)
            if after > 1.2 * before + 4:
                wrong.append(f"the {of} have grown from {before:.1f} to {after:.1f}")
        return wrong
