"""What hf_xet asks of a hub and its storage; importing this adds it to `tests.hub_server`.

A file is cut into chunks, chunks are packed into xorbs of at most 64 MiB, and a shard tells of which chunks a file is
made. The names of chunks, xorbs and files are hashes by BLAKE3, and taken on trust here: what a shard says that a file
is, is put together and held against its sha256.
"""

import hmac
import json
import re
import struct
from collections.abc import Iterator
from typing import Any

from tests.hub_repository import HASH, Refused, Repo, write
from tests.hub_server import REPO, REVISION, Exchange, route


@route("GET", f"/api/models/{REPO}/xet-(read|write)-token/{REVISION}")
def give_token(exchange: Exchange, name: str, scope: str, revision: str) -> None:
    exchange.repo(name, write=scope == "write").find(revision)
    hub, token, end = exchange.server, f"{scope}:{name}", 2**32
    token += f":{hub.signature(token)}"
    headers = {"X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(end), "X-Xet-Cas-Url": hub.storage}
    exchange.tell(dict(accessToken=token, exp=end, casUrl=hub.storage), headers)


def repo_of_token(exchange: Exchange, scope: str) -> Repo:
    token, _, signature = exchange.headers.get("Authorization", "").removeprefix("Bearer ").rpartition(":")
    if not hmac.compare_digest(signature, exchange.server.signature(token)):
        raise Refused(401, "a wrong token")
    granted, name = token.split(":")
    if scope == "write" != granted:
        raise Refused(403, "a token that only reads")
    return exchange.server.repo(name)


@route("POST", f"/v1/xorbs/default/{HASH}")
def upload_xorb(exchange: Exchange, xorb: str) -> None:
    repo_of_token(exchange, "write")
    content, path = exchange.body(exchange.server.cut_uploads), exchange.server.folder / "xorbs" / xorb
    chunks_of(content)
    new = not path.is_file()
    write(path, content)
    exchange.tell(dict(was_inserted=new))


@route("POST", "/v1/shards")
def upload_shard(exchange: Exchange) -> None:
    repo, folder = repo_of_token(exchange, "write"), exchange.server.folder
    for sha256, file, terms in files_of(exchange.body()):
        whole = bytearray()
        for xorb, size, start, end in terms:
            path = folder / "xorbs" / xorb
            packed = path.read_bytes() if path.is_file() else b""
            content = b"".join(packed[begin + 8 : stop] for begin, stop in chunks_of(packed)[start:end])
            if len(content) != size:
                raise Refused(400, f"chunks {start} to {end} of {xorb} are not {size} bytes that were uploaded")
            whole += content
        repo.add_large(bytes(whole), sha256, len(whole))
        write(repo.folder / "xet" / sha256, file.encode())
        write(folder / "files" / file, json.dumps(terms).encode())
    exchange.tell(dict(result=1))


@route("GET", f"/v1/reconstructions/{HASH}")
def reconstruct(exchange: Exchange, file: str) -> None:
    repo_of_token(exchange, "read")
    hub = exchange.server
    path = hub.folder / "files" / file
    if not path.is_file():
        raise Refused(404, f"no file {file}")
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", exchange.headers.get("Range", ""))
    first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, 2**63)
    terms: list[dict[str, Any]] = []
    fetches: dict[str, list[dict[str, Any]]] = {}
    before = skipped = 0
    for xorb, size, start, end in json.loads(path.read_text()):
        if before + size > first and before <= last:
            skipped = skipped if terms else max(0, first - before)
            chunks, held = chunks_of((hub.folder / "xorbs" / xorb).read_bytes())[start:end], dict(start=start, end=end)
            placed = dict(start=chunks[0][0], end=chunks[-1][1] - 1)
            fetch = dict(range=held, url_range=placed, url=hub.signed(f"/xorbs/{xorb}"))
            fetches.setdefault(xorb, []).append(fetch)
            terms.append(dict(hash=xorb, unpacked_length=size, range=held))
        before += size
    if not terms:
        raise Refused(416, f"bytes from {first} of {before}")
    exchange.tell(dict(offset_into_first_range=skipped, terms=terms, fetch_info=fetches))


@route("GET", f"/xorbs/{HASH}")
def download_xorb(exchange: Exchange, xorb: str) -> None:
    exchange.check_signature()
    exchange.give((exchange.server.folder / "xorbs" / xorb).read_bytes(), {})


def chunks_of(xorb: bytes) -> list[tuple[int, int]]:
    """Where each chunk begins, with a header of 8 bytes, and where it ends."""
    places, end = [], 0
    while (begin := end) < len(xorb):
        end = begin + 8 + int.from_bytes(xorb[begin + 1 : begin + 4], "little")
        if end > len(xorb) or xorb[begin]:
            raise Refused(400, "not a xorb")
        if xorb[begin + 4]:
            raise Refused(400, "compressed chunks: set HF_XET_XORB_COMPRESSION_POLICY=none")
        places.append((begin, end))
    return places


def files_of(shard: bytes) -> Iterator[tuple[str, str, list[tuple[str, int, int, int]]]]:
    """The sha256 and the xet hash of each file, and what it is made of: xorbs, bytes, chunks from and to."""

    def named(raw: bytes) -> str:
        return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))

    # Entries of 48 bytes: a file, its terms, as many for verification if flagged, and its sha256 if flagged.
    position = 48
    while (raw := shard[position : position + 32]) != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", shard, position + 32)
        verified, with_sha256 = flags >> 31, flags >> 30 & 1
        if not with_sha256:
            raise Refused(400, "a file without its sha256")
        entries = [struct.unpack_from("<32s4I", shard, position + 48 * (1 + i)) for i in range(count)]
        position += 48 * (2 + count * (1 + verified))
        terms = [(named(xorb), size, start, end) for xorb, _, size, start, end in entries]
        yield named(shard[position - 48 : position - 16]), named(raw), terms
