"""Settings of a server, whose fields are options of `stepfuse serve`. Nothing here imports torch."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from stepfuse.data.settings_fields import check_settings, setting

TOKEN = "STEPFUSE_SERVE_TOKEN"
_address, _limits = partial(setting, group="address"), partial(setting, group="limits")
_speed = partial(setting, group="speed and memory")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a server listens, what it accepts, and how many rows it computes at once."""

    host: str = _address(
        "127.0.0.1",
        "Address to listen on; 0.0.0.0 for all networks, which needs a token or --public (default: 127.0.0.1, this "
        "machine only).",
        metavar="ADDRESS",
    )
    port: int = _address(8000, "Port to listen on, 0 for any free one.", least=0, most=65535)
    public: bool = _address(
        False,
        "Let anybody who reaches the address generate images, without a token (default: only this machine, or by a "
        "token).",
    )
    trusted_proxies: str | None = _address(
        None,
        "Addresses and networks of proxies whose X-Forwarded-For names the client, such as 10.0.0.0/8 (default: "
        "this machine; with --public all private networks).",
        metavar="ADDRESSES",
    )
    max_queue: int = _limits(
        128, "Requests of each priority that may wait; more are answered with status 429.", least=1
    )
    max_queue_per_client: int | None = _limits(
        None, "Those of one client's address (default: --max_queue; with --public 8).", least=1
    )
    max_images: int | None = _limits(
        None,
        "Most images of one request; a strip, a loop, or another list of weights may have 4 times as many (default: "
        "16; with --public 4).",
        least=1,
    )
    max_steps: int | None = _limits(None, "Most denoising steps (default: 200; with --public 50).", least=1)
    max_pixels: int | None = _limits(
        None, "Most pixels of an image, height × width (default: 4 times those of the base model).", least=1
    )
    time_limit: float = _limits(
        600.0, "Seconds after which a request is given up, its wait included.", metavar="SECONDS", above=0
    )
    grace: float = _limits(60.0, "Seconds that running requests have to end after SIGTERM.", metavar="SECONDS", least=0)
    max_rows: int = _speed(
        16,
        "Most rows of one forward pass, which requests share: a row per image for the soup, a row per image and "
        "adapter for the product, and more for guidance.",
        least=1,
    )
    compile: Literal["", "regional", "full"] = _speed(
        "",
        "Compile the network with torch.compile. regional: each transformer block; full: all of it (default: no "
        "compilation).",
    )
    mode: Literal["", "default", "reduce-overhead", "max-autotune"] = _speed(
        "", "Mode of torch.compile; reduce-overhead and max-autotune need a GPU (default: default)."
    )
    decode_batch_size: int | None = _speed(
        None,
        "Images decoded at once by the autoencoder (default: as many as fit into a share of the memory).",
        least=1,
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def bound(self, name: str) -> int:
        """A bound, by default that of a server for everybody or for those one knows."""
        given: int | None = getattr(self, name)
        if given is not None:
            return given
        return (
            {"max_queue_per_client": 8, "max_images": 4, "max_steps": 50}[name]
            if self.public
            else {"max_queue_per_client": self.max_queue, "max_images": 16, "max_steps": 200}[name]
        )

    def check_together(self) -> None:
        if self.mode and not self.compile:
            raise ValueError(f"mode {self.mode} is a mode of torch.compile; add --compile regional or full")
