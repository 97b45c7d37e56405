"""What clients have seen, compared with what the server counts of itself."""

import re
import threading
from collections import Counter
from dataclasses import dataclass, field

from stepfuse.scripts.benchmark.server_process import ServerProcess


@dataclass(kw_only=True)
class Tally:
    """Answers of a server, by all its clients.

    Attributes:
        statuses: of the answers to requests for images that the server counts.
        left: requests that the client left, which end with status 499, or with 200 if they were drawn by then.
        images: drawn in answers with status 200.
        images_left: that the requests which the client left would have.
        actions: what clients did, by name.
        faults: what went wrong, a line each.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    left: int = 0
    images: int = 0
    images_left: int = 0
    actions: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, status: int, *, images: int = 0) -> None:
        with self._lock:
            self.statuses[status] += 1
            self.images += images

    def abandoned(self, *, images: int = 0) -> None:
        with self._lock:
            self.left += 1
            self.images_left += images

    def did(self, action: str) -> None:
        with self._lock:
            self.actions[action] += 1

    def fault(self, text: str) -> None:
        with self._lock:
            self.faults.append(text)

    def compare(self, counted: Counter[int], images: int) -> list[str]:
        """What of the server's counts does not agree with these."""
        wrong = []
        for status in sorted({*self.statuses, *counted} - {200, 499}):
            if self.statuses[status] != counted[status]:
                wrong.append(
                    f"status {status}: {self.statuses[status]} answers, and the server counts {counted[status]}"
                )
        ended = counted[200] + counted[499]
        if ended != self.statuses[200] + self.left:
            wrong.append(
                f"{self.statuses[200]} requests were answered and {self.left} were left by their clients, and the "
                f"server counts {counted[200]} and {counted[499]}"
            )
        if not self.statuses[200] <= counted[200]:
            wrong.append(f"{self.statuses[200]} requests were answered, and the server counts {counted[200]}")
        if not self.images <= images <= self.images + self.images_left:
            wrong.append(f"{self.images} images were generated, and the server counts {images}")
        return wrong


def counted(server: ServerProcess) -> tuple[Counter[int], int]:
    """Requests by status, and images, as `GET /metrics` has them."""
    text = server.ask("GET", "/metrics")[1].decode()
    requests = re.findall(r'^stepfuse_requests_total\{status="(\d+)"\} (\S+)$', text, re.MULTILINE)
    images = re.search(r"^stepfuse_images_total (\S+)$", text, re.MULTILINE)
    return Counter({int(status): int(float(count)) for status, count in requests}), int(
        float(images[1] if images else 0)
    )
