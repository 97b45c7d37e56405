"""The page of `stepfuse serve` in Chromium."""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import uvicorn
from PIL import Image

from stepfuse.scripts.load.browser import find_browser
from stepfuse.scripts.serve.app import Service, make_app
from tests.fixtures_serve import Running

playwright = pytest.importorskip("playwright.sync_api", reason="the page is driven by playwright")
CHROMIUM = find_browser()
IN_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="the page is looked at in Chromium, which is not here"),
]
SECONDS = 60_000  # milliseconds in which a busy machine draws
PIXELS = """async () => {
    const image = document.querySelector(".view img"); await image.decode();
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight), context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
}"""
DROP = """(content) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0)), carried = new DataTransfer();
    carried.items.add(new File([bytes], "saved.png", { type: "image/png" }));
    document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true }));
}"""


@contextmanager
def listening(service: Service, port: int = 0) -> Iterator[str]:
    """Another server of a service that is started already; its address."""
    config = uvicorn.Config(make_app(service), port=port, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@contextmanager
def tab_of(browser: Any) -> Iterator[Any]:
    """A tab, which fails for what the page reports as an error of its own."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(SECONDS)
    tab, errors = context.new_page(), []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    yield tab
    context.close()
    assert errors == []


def visit(page: Any, server: Running, **settings: object) -> None:
    """Open the page with settings in its address, and wait for their picture."""
    page.goto("about:blank")
    page.goto(f"{server.url}/#{urlencode({'steps': 2} | settings)}")
    exact(page)


def exact(page: Any) -> None:
    """Wait until every picture is the one that was asked for."""
    page.wait_for_selector("#figures:has(.view):not(:has(.view:not([data-kind=exact])))")


def shown(page: Any) -> np.ndarray:
    pixels = np.array(page.evaluate(PIXELS), dtype=np.uint8)
    return pixels.reshape(64, 64, 4)[..., :3]


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
