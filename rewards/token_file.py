"""The token that a server asks its clients for. Importing this does not import torch."""

import os
from pathlib import Path

TOKEN = "STEPFUSE_REWARD_TOKEN"


def read_token(file: Path | None, variable: str = TOKEN) -> str | None:
    """Read the token from a file, or by default from an environment variable; None if that is not set.

    Raises:
        ValueError: If the file is missing or empty, or if the token is not one word of ASCII letters, digits and
            punctuation. The message does not contain the token.
    """
    source = f"the variable {variable}" if file is None else f"token file {file}"
    if file is not None and not file.is_file():
        raise ValueError(f"no {source}")
    token = os.environ.get(variable) if file is None else file.read_text(encoding="utf-8-sig", errors="replace")
    if token is None:
        return None
    token = token.strip()
    if not (token.isascii() and token.isprintable()) or " " in token or not (token or file is None):
        raise ValueError(f"{source} does not hold a token; expected one word of letters, digits and punctuation")
    return token or None
