"""huggingface_hub of this process, sent to a hub on this machine as HF_ENDPOINT would have sent it from the start."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants, hf_api
from huggingface_hub.utils import _http, _xet, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

import tests.hub_lfs
import tests.hub_xet  # noqa: F401
from tests.hub_server import Hub, running_hub

TOKENS = {"hf_of_ada": "ada", "hf_of_bob": "bob"}
TRIES = 6  # of an upload, huggingface_hub's and hf_xet's alike


@contextmanager
def hub_of_clients(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, xet: bool = True, part_size: int | None = None
) -> Iterator[Hub]:
    """A running hub to which every call of huggingface_hub goes; caches are empty, and nobody is logged in.

    Failed calls are repeated as often as elsewhere, but after milliseconds. Without `xet`, large files go by LFS, as
    from machines that hf_xet is not made for.
    """
    settings = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,  # or huggingface.co is asked for the names of agents
        "HF_HUB_DISABLE_XET": not xet,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_TOKEN_PATH": str(folder / "token"),
        "HF_STORED_TOKENS_PATH": str(folder / "stored_tokens"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # hf_xet reads these when its session begins: a new one for every hub, as a port may come again.
    monkeypatch.setenv("HF_XET_CACHE", str(folder / "xet"))
    monkeypatch.setenv("HF_XET_XORB_COMPRESSION_POLICY", "none")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())
    monkeypatch.setattr(_xet, "XET_CONNECTION_INFO_CACHE", {})
    monkeypatch.setitem(_http.http_backoff.__kwdefaults__, "base_wait_time", 0.001)
    with running_hub(folder / "hub", TOKENS, part_size) as hub, warnings.catch_warnings():
        # Both: an address is made of the template, then turned from ENDPOINT to the endpoint of the call.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)  # its methods are the functions of huggingface_hub
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # httpx2's, of uploads by LFS
        if shown := not are_progress_bars_disabled():
            disable_progress_bars()  # those of uploads that fail are never closed, and write when the tests are over
        close_session()
        yield hub
        close_session()
        if shown:
            enable_progress_bars()
