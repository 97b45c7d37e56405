"""Where a server listens, and who may draw there: all that is known before torch is imported."""

import errno
import socket
from contextlib import ExitStack
from pathlib import Path

from stepfuse.rewards.token_file import read_token
from stepfuse.scripts.serve.access import Access, is_loopback
from stepfuse.scripts.serve.settings import TOKEN, ServeSettings


def access_of(settings: ServeSettings, token_file: Path | None) -> Access:
    """Who may draw: this machine alone, or whoever has the token; with `public` anybody."""
    token = read_token(token_file, TOKEN)
    if settings.public and token_file is not None:
        raise ValueError("--public and --token_file; expected one of the two")
    if settings.public:
        return Access(any_host=True)
    loopback = is_loopback(settings.host)
    if token is None and not loopback:
        raise ValueError(
            f"--host {settings.host} is reached from other machines; give --token_file, with a token that clients "
            "must send, or --public to let anybody generate images"
        )
    if token is not None and len(token) < 16:
        raise ValueError(f"the token has {len(token)} characters; expected at least 16")
    return Access(token=token, any_host=not loopback or token is not None)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; a ValueError says why there is none."""
    with ExitStack() as failed:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = failed.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError as error:
            another = "; choose another --port" if error.errno == errno.EADDRINUSE else ""
            raise ValueError(f"cannot listen on {host}:{port} ({error.strerror or error}){another}") from error
        failed.pop_all()
        return listener
