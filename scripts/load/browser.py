"""The browser that pages are opened in."""

import shutil

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The program of Chromium or Chrome; None if neither is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)
