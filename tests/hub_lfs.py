"""Large files by git LFS, in one piece or in parts; importing this adds it to `tests.hub_server`."""

import hashlib
import re
from typing import Any

from tests.hub_repository import HASH, Refused, write
from tests.hub_server import REPO, Exchange, route


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def batch(exchange: Exchange, name: str) -> None:
    repo, shown = exchange.repo(name, write=True), []
    for one in exchange.given()["objects"]:
        oid, size, part = one["oid"], one["size"], exchange.server.part_size
        told = dict(oid=oid, size=size)
        if not re.fullmatch(HASH, oid) or size < 1:
            told |= dict(error=dict(code=422, message="not the sha256 and the size of an object"))
        elif not repo.large(oid).is_file():
            path, query = f"/upload/{name}/{oid}", f"size={size}"
            upload: dict[str, Any] = dict(href=exchange.server.signed(path, query))
            if part and size > part:
                parts = {str(i): exchange.server.signed(path, f"part={i}") for i in range(1, -(-size // part) + 1)}
                upload["header"] = parts | dict(chunk_size=str(part))
            verify = dict(href=f"{exchange.server.endpoint}/{name}.git/info/lfs/objects/verify")
            told |= dict(actions=dict(upload=upload, verify=verify))
        shown.append(told)
    exchange.tell(dict(objects=shown))


@route("PUT", f"/upload/{REPO}/{HASH}")
def upload(exchange: Exchange, name: str, oid: str) -> None:
    exchange.check_signature()
    if "Content-Length" not in exchange.headers:
        raise Refused(411, "an upload without its length")
    content, repo = exchange.body(exchange.server.cut_uploads), exchange.server.repo(name)
    if part := exchange.query.get("part"):
        write(repo.folder / "parts" / oid / part, content)
    else:
        repo.add_large(content, oid, int(exchange.query["size"]))
    exchange.answer(b"", {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})


@route("POST", f"/upload/{REPO}/{HASH}")
def complete(exchange: Exchange, name: str, oid: str) -> None:
    exchange.check_signature()
    repo, whole = exchange.server.repo(name), b""
    for one in exchange.given()["parts"]:
        path = repo.folder / "parts" / oid / str(int(one["partNumber"]))
        content = path.read_bytes() if path.is_file() else b""
        if one["etag"] != f'"{hashlib.md5(content).hexdigest()}"':
            raise Refused(400, f"part {one['partNumber']} is not what was uploaded")
        whole += content
    repo.add_large(whole, oid, int(exchange.query["size"]))
    exchange.tell({})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
def verify(exchange: Exchange, name: str) -> None:
    repo, given = exchange.repo(name, write=True), exchange.given()
    path = repo.large(given["oid"])
    if not path.is_file() or path.stat().st_size != given["size"]:
        raise Refused(404, f"not uploaded: {given['oid']}")
    exchange.tell({})


@route("GET", f"/download/{REPO}/{HASH}")
def download(exchange: Exchange, name: str, oid: str) -> None:
    exchange.check_signature()
    exchange.give(exchange.server.repo(name).large(oid).read_bytes(), {"ETag": f'"{oid}"'})
