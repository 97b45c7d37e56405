"""What the server measures of itself, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
FORWARD_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "stepfuse_requests",
            "Requests for images that were answered, by HTTP status.",
            ["status"],
            registry=registry,
        )
        self._images = Counter("stepfuse_images", "Images that were generated.", registry=registry)
        self._request_seconds = Histogram(
            "stepfuse_request_seconds",
            "Seconds from the arrival of a request to its last image.",
            buckets=SECONDS,
            registry=registry,
        )
        self._waiting = Gauge("stepfuse_queue_requests", "Requests that wait.", registry=registry)
        self._running = Gauge(
            "stepfuse_running_requests", "Requests whose images are being generated.", registry=registry
        )
        self._rows = Histogram(
            "stepfuse_forward_rows", "Rows of requests in a forward.", buckets=ROWS, registry=registry
        )
        self._forward_seconds = Histogram(
            "stepfuse_forward_seconds", "Seconds of a forward.", buckets=FORWARD_SECONDS, registry=registry
        )
        self._padding = Counter("stepfuse_forward_padding_rows", "Rows computed in vain.", registry=registry)

    def request(self, status: int, *, images: int = 0, seconds: float | None = None) -> None:
        self._requests.labels(str(status)).inc()
        self._images.inc(images)
        if seconds is not None:
            self._request_seconds.observe(seconds)

    def forward(self, *, rows: int, padding: int, seconds: float) -> None:
        self._rows.observe(rows)
        self._padding.inc(padding)
        self._forward_seconds.observe(seconds)

    def state(self, *, waiting: int, running: int) -> None:
        self._waiting.set(waiting)
        self._running.set(running)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
