"""A hub on this machine: models and Spaces over the HTTP protocol of huggingface.co, kept in a folder.

Speaks what huggingface_hub 2.4 asks for and refuses what the real hub refuses. Large files come by LFS with
`tests.hub_lfs` imported, and by xet with `tests.hub_xet`: it is the client that decides. Storage is another origin than
the hub, as theirs is: tokens must not follow there. A Space is a repository with an SDK, at addresses of its own;
nothing runs in it.
"""

import hmac
import json
import re
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml

from tests.hub_repository import (
    GITATTRIBUTES,
    LARGE,
    LARGEST_REGULAR,
    SDKS,
    Refused,
    Repo,
    change,
    check_space,
    front_matter,
    git_hash,
    now,
)

REPO, REVISION = r"(\w[\w.-]*/\w[\w.-]*)", "([^/]+)"


class Cut(Exception):
    """The connection ended in the middle of a body."""


@dataclass
class Cuts:
    """The next `times` bodies of more than `after` bytes are cut there, the first `skip` of them excepted."""

    after: int = 0
    times: int = 0
    skip: int = 0

    def due(self, length: int) -> bool:
        long = length > self.after
        due = long and self.times > 0 and not self.skip
        self.times -= due
        self.skip = max(0, self.skip - long)
        return due


@dataclass(frozen=True)
class Request:
    """One that was answered or cut."""

    method: str
    path: str  # without the query, where signatures are
    received: int  # bytes of its body
    status: int | None  # none if it was cut
    headers: Mapping[str, str]  # by names in lower case; of a token, only that there was one


class Hub(ThreadingHTTPServer):
    """The server; `running_hub` starts it.

    Args:
        folder: what it keeps; another hub goes on from there.
        tokens: users by their tokens; a user writes to the models under their own name.
        part_size: bytes; a larger LFS upload is asked for in parts of that many.
    """

    daemon_threads = True

    def __init__(self, folder: Path, tokens: Mapping[str, str], part_size: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.folder, self.tokens, self.part_size = folder, tokens, part_size
        self.endpoint, self.storage = (f"http://{host}:{self.server_port}" for host in ("127.0.0.1", "localhost"))
        self.secret, self.lock = secrets.token_bytes(), threading.Lock()
        self.requests: list[Request] = []
        self.cut_uploads, self.cut_downloads = Cuts(), Cuts()  # of large files; of any

    def repo(self, name: str, *, space: bool = False) -> Repo:
        return Repo(self.folder / "spaces" / name if space else self.folder / name)

    def signature(self, text: str) -> str:
        return hmac.new(self.secret, text.encode(), "sha256").hexdigest()

    def signed(self, path: str, query: str = "") -> str:
        """An address in the storage, for whoever has it."""
        return f"{self.storage}{path}?{query}&signature={self.signature(f'{path}?{query}')}"

    def uploads(self) -> list[Request]:
        """The requests that brought content of large files."""
        return [one for one in self.requests if re.match("PUT /upload/|POST /v1/xorbs/", f"{one.method} {one.path}")]


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(action: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append((method, re.compile(pattern), action))
        return action

    return add


class Exchange(BaseHTTPRequestHandler):
    """One request and its answer."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def handle_request(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = {name: values[0] for name, values in parse_qs(query).items()}
        self.received = 0
        try:
            try:
                self.act("GET" if self.command == "HEAD" else self.command, path)
            except (KeyError, TypeError, ValueError) as error:
                raise Refused(400, f"{type(error).__name__}: {error}") from error
        except Refused as refused:
            self.body()  # the answer to what was not read would be lost with it
            self.answer(refused.body, refused.headers, refused.status)
        except Cut:
            self.record(None)
            self.close_connection = True  # what is left of the body is no request
            # A reset rather than an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def act(self, method: str, path: str) -> None:
        # Of a Space all else is as of a model.
        path, self.space = re.subn("^(/api)?/spaces/", lambda found: "/api/models/" if found[1] else "/", path)
        for its_method, pattern, action in ROUTES:
            if its_method == method and (match := pattern.fullmatch(path)):
                return action(self, *(part and unquote(part) for part in match.groups()))
        raise Refused(404, f"nothing at {path}")

    def record(self, status: int | None) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        if "authorization" in headers:
            headers["authorization"] = "Bearer ..."
        path = unquote(self.path.partition("?")[0])
        self.server.requests.append(Request(self.command, path, self.received, status, headers))

    def log_message(self, *_: Any) -> None:
        pass

    def body(self, cuts: Cuts | None = None) -> bytes:
        """What was not read of it yet."""
        length = int(self.headers.get("Content-Length") or 0) - self.received
        with self.server.lock:
            cut = cuts is not None and cuts.due(length)
        content = self.rfile.read(cuts.after if cuts and cut else length)
        self.received += len(content)
        if len(content) < length:
            raise Cut
        return content

    def given(self) -> Any:
        return json.loads(self.body())

    def answer(self, content: bytes, headers: Mapping[str, str], status: int = 200, sent: int | None = None) -> None:
        self.record(status if sent is None else None)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])

    def tell(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self.answer(json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def give(self, content: bytes, headers: Mapping[str, str]) -> None:
        """A file, or the range of it that was asked for."""
        headers, status = {"Accept-Ranges": "bytes", **headers}, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            if start > end:
                raise Refused(416, f"bytes from {start} of {len(content)}")
            headers, status = headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}, 206
            content = content[start : end + 1]
        with self.server.lock:
            cut = self.command == "GET" and self.server.cut_downloads.due(len(content))
        self.answer(content, headers, status, self.server.cut_downloads.after if cut else None)

    # Who asks.

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.server.tokens[token] if token else None

    def repo(self, name: str, *, write: bool = False) -> Repo:
        user, repo = self.user(), self.server.repo(name, space=bool(self.space))
        owned = user == name.split("/")[0]
        if not repo.exists() or (repo.state["private"] and not owned):
            message = "Repository not found" if user else "Invalid username or password."
            raise Refused(404 if user else 401, message, "RepoNotFound")
        if write and not owned:
            raise Refused(403 if user else 401, f"You don't have the rights to write to {name}")
        return repo

    def check_signature(self) -> None:
        target, _, signature = self.path.rpartition("&signature=")
        if not hmac.compare_digest(signature, self.server.signature(target)):
            raise Refused(403, "a wrong signature")

    # Models.

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        if (user := self.user()) is None:
            raise Refused(401, "Invalid username or password.")
        token = dict(type="access_token", accessToken=dict(displayName="test", role="write"))
        self.tell(dict(type="user", name=user, orgs=[], auth=token))

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        try:
            given = self.given()
            card = front_matter(given["content"])
            if given["repoType"] == "space":
                check_space(card or {})
        except yaml.YAMLError as error:
            raise Refused(400, "Invalid YAML in README.md", errors=[dict(message=str(error))], warnings=[]) from error
        warning = dict(message="empty or missing yaml metadata in repo card")
        self.tell(dict(errors=[], warnings=[] if card else [warning]))

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        user, given = self.user(), self.given()
        if user is None or given.get("organization") not in (None, user):
            raise Refused(403 if user else 401, "You don't have the rights to create a model under this namespace")
        name, private = f"{user}/{given['name']}", given.get("visibility") == "private"
        kind, sdk = given.get("type", "model"), given.get("sdk")
        if not re.fullmatch(REPO, name) or kind not in ("model", "space") or (kind == "space") != (sdk in SDKS):
            raise Refused(400, f"not a {kind}: {name} with the SDK {sdk}")
        repo = self.server.repo(name, space=kind == "space")
        url = f"{self.server.endpoint}/{'spaces/' if kind == 'space' else ''}{name}"
        with self.server.lock:
            if repo.exists():
                raise Refused(409, f"You already created this {kind} repo", url=url)
            repo.state = dict(private=private, branches={}, tags={}, created=now(), sdk=sdk)
            repo.commit("main", {".gitattributes": repo.add(GITATTRIBUTES)}, title="initial commit", user="system")
        self.tell(dict(url=url, name=name, private=private))

    @route("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?")
    def info(self, name: str, revision: str | None) -> None:
        repo = self.repo(name)
        (sha, files, commit), state, siblings = repo.find(revision or "main"), repo.state, []
        for path, file in files.items():
            large = dict(sha256=file.sha256, size=file.size, pointerSize=len(file.pointer)) if file.sha256 else None
            details = dict(size=file.size, blobId=file.oid, lfs=large) if "blobs" in self.query else {}
            siblings.append(dict(rfilename=path) | details)
        card = front_matter(repo.content(files["README.md"]).decode()) if "README.md" in files else None
        about = dict(id=name, modelId=name, author=name.split("/")[0], sha=sha, private=state["private"], cardData=card)
        dates = dict(createdAt=state["created"], lastModified=commit["date"])
        about |= dict(sdk=(card or {}).get("sdk", state["sdk"])) if self.space else {}
        self.tell(about | dates | dict(gated=False, disabled=False, tags=[], siblings=siblings))

    @route("GET", f"/api/models/{REPO}/refs")
    def refs(self, name: str) -> None:
        state, shown = self.repo(name).state, dict(converts=[], pullRequests=[])
        for kind, prefix in (("branches", "refs/heads/"), ("tags", "refs/tags/")):
            shown[kind] = [dict(name=ref, ref=prefix + ref, targetCommit=sha) for ref, sha in state[kind].items()]
        self.tell(shown)

    @route("GET", f"/api/models/{REPO}/commits/{REVISION}")
    def commits(self, name: str, revision: str | None) -> None:
        repo, shown = self.repo(name), []
        while revision:
            sha, _, commit = repo.find(revision)
            authors, message = [dict(user=commit["user"])], commit.get("message", "")
            shown.append(dict(id=sha, title=commit["title"], message=message, authors=authors, date=commit["date"]))
            revision = commit["parent"]
        self.tell(shown)

    @route("POST", f"/api/models/{REPO}/(branch|tag)/{REVISION}")
    def create_ref(self, name: str, kind: str, ref: str) -> None:
        repo, given = self.repo(name, write=True), self.given()
        # The address has a branch's own name, but what a tag marks.
        ref, start = (given["tag"], ref) if kind == "tag" else (ref, given.get("startingPoint", "main"))
        with self.server.lock:
            state, sha = repo.state, repo.find(start)[0]
            if ref in state["tags"] or ref in state["branches"]:
                raise Refused(409, f"Reference already exists: {ref}")
            state["tags" if kind == "tag" else "branches"][ref] = sha
            repo.state = state
        self.tell({})

    @route("GET", f"/api/models/{REPO}/tree/{REVISION}(?:/(.+))?")
    def tree(self, name: str, revision: str, folder: str | None) -> None:
        repo, prefix = self.repo(name), f"{folder}/" if folder else ""
        files = {path: file for path, file in repo.find(revision)[1].items() if path.startswith(prefix)}
        if folder and not files:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        shown: dict[str, dict[str, Any]] = {}
        deep = self.query.get("recursive", "").lower() in ("1", "true")
        for path, file in files.items():
            above = [str(parent) for parent in Path(path.removeprefix(prefix)).parents][-2::-1]
            for parent in above if deep else above[:1]:
                oid = git_hash(f"{revision}/{prefix}{parent}".encode())
                shown[prefix + parent] = dict(type="directory", path=prefix + parent, oid=oid, size=0)
            if deep or not above:
                shown[path] = repo.entry(path, file)
        self.tell(list(shown.values()))

    @route("POST", f"/api/models/{REPO}/paths-info/{REVISION}")
    def paths_info(self, name: str, revision: str) -> None:
        repo, paths = self.repo(name), parse_qs(self.body().decode()).get("paths", [])
        files = repo.find(revision)[1]
        self.tell([repo.entry(path, files[path]) for path in paths if path in files])

    @route("GET", f"/{REPO}/resolve/{REVISION}/(.+)")
    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        sha, files, _ = repo.find(revision)
        headers = {"X-Repo-Commit": sha}
        if (file := files.get(path)) is None:
            missing = Refused(404, "Entry not found", "EntryNotFound")
            missing.headers |= headers
            raise missing
        if not file.sha256:
            return self.give(repo.content(file), headers | {"ETag": f'"{file.oid}"'})
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if xet := repo.xet_hash(file.sha256):
            token = f"{self.server.endpoint}/api/models/{name}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": xet, "Link": f'<{token}>; rel="xet-auth"'}
        self.answer(b"", headers | {"Location": self.server.signed(f"/download/{name}/{file.sha256}")}, 302)

    # A commit.

    @route("POST", f"/api/models/{REPO}/preupload/{REVISION}")
    def preupload(self, name: str, revision: str) -> None:
        sha, files, _ = self.repo(name, write=True).find(revision)
        shown = []
        for one in self.given()["files"]:
            mode = "lfs" if one["path"].endswith(LARGE) or one["size"] > LARGEST_REGULAR else "regular"
            file = files.get(one["path"])
            oid = (file.sha256 or file.oid) if file else None
            shown.append(dict(path=one["path"], uploadMode=mode, shouldIgnore=False, oid=oid))
        self.tell(dict(files=shown, commitOid=sha))

    @route("POST", f"/api/models/{REPO}/commit/{REVISION}")
    def commit(self, name: str, branch: str) -> None:
        repo, lines = self.repo(name, write=True), [json.loads(line) for line in self.body().splitlines()]
        header = {line["key"]: line["value"] for line in lines[:1]}["header"]
        with self.server.lock:
            sha, files, _ = repo.find(branch)
            if branch not in repo.state["branches"]:
                raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            if not sha.startswith(header.get("parentCommit", sha)):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            for line in lines[1:]:
                change(repo, files, line["key"], line["value"])
            about = dict(title=header["summary"], message=header.get("description", ""), user=str(self.user()))
            sha = repo.commit(branch, files, **about)
        url = f"{self.server.endpoint}/{'spaces/' if self.space else ''}{name}/commit/{sha}"
        self.tell(dict(success=True, commitOid=sha, commitUrl=url, hookOutput=""))


@contextmanager
def running_hub(folder: Path, tokens: Mapping[str, str], part_size: int | None = None) -> Iterator[Hub]:
    """A hub that serves until the block ends; its `endpoint` is what clients are given."""
    with Hub(folder, tokens, part_size) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
