"""Loading what a server needs, and running it until it is told to stop."""

import signal
import socket
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from stepfuse.data.stages import stage
from stepfuse.fuse.backbones.compilation import check_compilation
from stepfuse.fuse.backbones.denoiser import ForwardRows
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.sampling.shared_forwards import SharedForwards
from stepfuse.scripts.serve.access import Access
from stepfuse.scripts.serve.app import Service, make_app
from stepfuse.scripts.serve.drawing import Limits, read_drawing
from stepfuse.scripts.serve.engine import Engine
from stepfuse.scripts.serve.errors import RequestError
from stepfuse.scripts.serve.host_memory import keep_what_is_loaded
from stepfuse.scripts.serve.metrics import Metrics
from stepfuse.scripts.serve.prepared import prepare
from stepfuse.scripts.serve.served_sets import ServedSet, load_sets
from stepfuse.scripts.serve.settings import ServeSettings

# Where proxies may be, when anybody may draw: of the addresses that X-Forwarded-For names, the last one outside these
# networks is the client's.
PRIVATE_NETWORKS = "127.0.0.0/8,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,::1/128,fc00::/7"


class Server(uvicorn.Server):
    """Uvicorn's server; told to stop, it refuses new requests at once and lets those it has end."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's, but the signal is not raised again at the end, so that a tidy stop has exit status 0."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        self._service.engine.refuse()
        stop = partial(self._service.engine.stop, seconds=self._grace)
        threading.Thread(target=stop, daemon=True).start()


def serve(
    sets: Sequence[str | Path],
    settings: ServeSettings,
    *,
    access: Access,
    listener: socket.socket,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Serve sets of one base until SIGTERM or SIGINT, and close the socket; a ValueError for what cannot be served."""
    with listener:
        service = make_service(sets, settings, access=access, dtype=dtype, device=device)
        config = uvicorn.Config(
            make_app(service),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=round(settings.grace) + 10,  # the engine gives up what is left before
            forwarded_allow_ips=settings.trusted_proxies or (PRIVATE_NETWORKS if settings.public else "127.0.0.1,::1"),
            server_header=False,
        )
        keep_what_is_loaded()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        names = ", ".join(service.sets)
        print(f"{names} at http://{shown}:{port}{'/#token=' + access.token if access.token else ''}", flush=True)
        Server(config, service, settings.grace).run(sockets=[listener])


def make_service(
    sets: Sequence[str | Path], settings: ServeSettings, *, access: Access, dtype: torch.dtype, device: str
) -> Service:
    """Load sets and all that is needed to draw them; a ValueError names what is at fault."""
    if settings.compile:
        check_compilation(settings.compile, settings.mode or "default", device)
    loaded, adapters = load_sets(sets, dtype=dtype, device=device, decode_batch_size=settings.decode_batch_size)
    backbone = loaded[0].sampler.backbone
    backbone.keep_device()
    forwards = SharedForwards(backbone, adapters, max_rows=settings.max_rows, exact=backbone.device.type == "cpu")
    if settings.compile:
        backbone.compile(settings.compile, fullgraph=True, **({"mode": settings.mode} if settings.mode else {}))
    metrics = Metrics()
    engine = Engine(
        forwards, metrics=metrics, max_waiting=settings.max_queue, max_per_client=settings.bound("max_queue_per_client")
    )
    stage("Generating first images, to choose the batch sizes …")
    for each in loaded:
        warm_up(each, forwards)
    height, width = backbone.size()
    limits = Limits(
        images=settings.bound("max_images"),
        frames=4 * settings.bound("max_images"),
        steps=settings.bound("max_steps"),
        pixels=settings.max_pixels or 4 * height * width,
    )
    return Service(loaded, engine, metrics, limits=limits, access=access, time_limit=settings.time_limit)


def warm_up(served: ServedSet, forwards: SharedForwards) -> None:
    """Draw an image in two steps, so that the first request finds the numbers of rows that are computed alike."""
    prompt = served.describe()["prompts"][0]
    drawing = read_drawing({"model": served.name, "prompt": prompt, "steps": 2, "seed": 0}, Limits())
    prepared = prepare(drawing, {served.name: served}, forwards.max_rows)

    def predict(branches: Sequence[ForwardRows]) -> list[Latents]:
        for rows in branches:
            forwards.calibrate(rows)
        return [forwards.run([rows]).outputs for rows in branches]

    try:
        with torch.no_grad():
            prepared.draw(predict)
    except RequestError as error:
        raise ValueError(f"{served.name} cannot generate an image: {error}") from error
