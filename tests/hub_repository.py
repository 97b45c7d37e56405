"""What the tests' hub keeps of a model or a Space: commits, branches and content by its hash, in a folder."""

import base64
import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

LARGE = (".bin", ".ckpt", ".gz", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".tar", ".zip")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()
SDKS = ("docker", "gradio", "static")  # of Spaces
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
HASH = "([0-9a-f]{64})"  # a sha256
LARGEST_REGULAR = 10 * 1024**2  # bytes; what is larger is a large file, whatever its name


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, json.dumps({"error": message, **body}).encode()
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class File:
    """Of a commit. A large one is known by the sha256 of its content, and its git hash is that of its pointer."""

    oid: str
    size: int
    sha256: str = ""

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write(path: Path, content: bytes) -> None:
    """All of it at once, for whoever reads meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    partial.write_bytes(content)
    os.replace(partial, path)


def front_matter(card: str) -> dict[str, Any] | None:
    """The YAML at the top of a README.md, if there is any; an error of yaml's if it is not names with values."""
    match = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:\r\n|\n|\Z)", card, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    if match and not isinstance(data, dict):
        raise yaml.YAMLError("The YAML metadata of your README.md is invalid.")
    return data


def check_space(card: Mapping[str, Any]) -> None:
    """An error of yaml's for a Space's card that the hub's reference of Spaces does not allow."""
    faults = [f'"{key}" must be one of {COLOURS}' for key in ("colorFrom", "colorTo") if card.get(key) not in COLOURS]
    faults += [f'"sdk" must be one of {SDKS}'] * (card.get("sdk") not in SDKS)
    faults += ['"short_description" is longer than 60 characters'] * (len(card.get("short_description", "")) > 60)
    if faults:
        raise yaml.YAMLError("; ".join(faults))


class Repo:
    """A model: who may read it, its branches and tags, its commits, and content by hash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def exists(self) -> bool:
        return (self.folder / "repo.json").is_file()

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "repo.json").read_text())

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        write(self.folder / "repo.json", json.dumps(state).encode())

    def find(self, revision: str) -> tuple[str, dict[str, File], dict[str, Any]]:
        """A branch, tag or hash → the commit's hash, its files, and who made it, when, of which parent."""
        state = self.state
        sha = state["branches"].get(revision) or state["tags"].get(revision) or revision
        path = self.folder / "commits" / sha
        if not re.fullmatch("[0-9a-f]{40}", sha) or not path.is_file():
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        commit = json.loads(path.read_text())
        return sha, {name: File(**file) for name, file in commit.pop("files").items()}, commit

    def commit(self, branch: str, files: Mapping[str, File], **about: str) -> str:
        state = self.state
        history = dict(date=now(), parent=state["branches"].get(branch))
        content = json.dumps(about | history | dict(files={name: asdict(files[name]) for name in sorted(files)}))
        sha = hashlib.sha1(content.encode()).hexdigest()
        write(self.folder / "commits" / sha, content.encode())
        state["branches"][branch] = sha
        self.state = state  # from here on the commit is there, the whole of it
        return sha

    def add(self, content: bytes) -> File:
        file = File(git_hash(content), len(content))
        write(self.folder / "blobs" / file.oid, content)
        return file

    def content(self, file: File) -> bytes:
        return (self.folder / "blobs" / file.oid).read_bytes()

    def large(self, sha256: str) -> Path:
        return self.folder / "large" / sha256

    def add_large(self, content: bytes, sha256: str, size: int) -> None:
        if (len(content), hashlib.sha256(content).hexdigest()) != (size, sha256):
            raise Refused(400, f"{len(content)} bytes that are not the {size} of sha256 {sha256}")
        write(self.large(sha256), content)

    def xet_hash(self, sha256: str) -> str | None:
        path = self.folder / "xet" / sha256
        return path.read_text() if path.is_file() else None

    def entry(self, path: str, file: File) -> dict[str, Any]:
        """As trees show a file."""
        shown: dict[str, Any] = dict(type="file", path=path, oid=file.oid, size=file.size)
        if file.sha256:
            shown["lfs"] = dict(oid=file.sha256, size=file.size, pointerSize=len(file.pointer))
            shown["xetHash"] = self.xet_hash(file.sha256)
        return shown


def change(repo: Repo, files: dict[str, File], kind: str, value: Mapping[str, Any]) -> None:
    """One operation of a commit, on the files of its parent."""
    path = value["path"]
    if {"", ".", "..", ".git"} & set(path.rstrip("/").split("/")):
        raise Refused(400, f"not a path: {path}")
    if kind == "file":
        content = base64.b64decode(value["content"], validate=True)
        if len(content) > LARGEST_REGULAR:
            raise Refused(400, f"{path} has {len(content)} bytes: upload it as a large file")
        try:
            front_matter(content.decode() if path == "README.md" else "")
        except yaml.YAMLError as error:
            raise Refused(400, f"Invalid YAML in {path}: {error}") from error
        files[path] = repo.add(content)
    elif kind == "lfsFile":
        sha256, large = value["oid"], repo.large(value["oid"])
        size = large.stat().st_size if re.fullmatch(HASH, sha256) and large.is_file() else None
        if size is None or value.get("size", size) != size:
            raise Refused(400, f"an LFS pointer pointed to a file that does not exist. Offending file: {path}")
        files[path] = File(git_hash(File("", size, sha256).pointer), size, sha256)
    elif kind in ("deletedFile", "deletedFolder"):
        folder = path.rstrip("/") + "/"
        gone = [name for name in files if (name.startswith(folder) if kind == "deletedFolder" else name == path)]
        if not gone:
            raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise Refused(400, f"not an operation of a commit: {kind}")
