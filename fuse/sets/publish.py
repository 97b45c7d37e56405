"""`stepfuse publish`: a set, checked, with its card, in one commit of a repository of the hub."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from stepfuse.data import emoji
from stepfuse.data.file_info import size_label
from stepfuse.data.text_files import read_text
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set, set_folder
from stepfuse.fuse.sets.card import card, shown_on_card
from stepfuse.fuse.sets.hub import hub_errors, parse_id
from stepfuse.fuse.sets.manifest import CARD, MANIFEST
from stepfuse.rewards.registry import local_parts

DEFAULT = "main"


@dataclass(frozen=True, kw_only=True)
class Publication:
    """The files that will be sent, and where.

    Attributes:
        repository: `owner/name`.
        revision: a branch; made where there is none.
        private: of a repository that is made.
        exists: the repository is there already.
        files: contents by the path they will have.
        stale: weights in the repository of adapters that are no longer in the set.
        notes: on what is not sent, a line each.
    """

    repository: str
    revision: str
    private: bool
    exists: bool
    files: dict[str, bytes | Path]
    stale: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in self.files.items()}
        kind = "private" if self.private else "public"
        where = f"{self.repository}, branch {self.revision}" + ("" if self.exists else f" (a new {kind} repository)")
        lines = [f"to {where}, in one commit:"]
        lines += [f"  {size_label(size):>10}  {name}" for name, size in sizes.items()]
        lines += [f"  {'deleted':>10}  {name}" for name in self.stale]
        return "\n".join([*lines, f"  {size_label(sum(sizes.values())):>10}  in all", *self.notes])


def prepare(
    adapter_set: str | Path,
    repository: str,
    *,
    revision: str = DEFAULT,
    private: bool = False,
    ask_hub: bool = True,
) -> Publication:
    """Check a set and collect the files to send; nothing is sent.

    Args:
        revision: a branch.
        ask_hub: look up whether the repository exists, and what it holds.

    Raises:
        ValueError: for a faulty set, a base that others cannot load, licences that are not stated, a name that is no
            hub id, and a public repository where a private one is wanted.
    """
    if parse_id(repository) != (repository, None):
        raise ValueError(f"{repository!r}; expected OWNER/NAME, the revision by --revision")
    folder = set_folder(adapter_set)
    loaded = load_set(folder)
    check_publishable(loaded)
    check_secrets(folder / MANIFEST)
    shown = shown_on_card(folder)
    files: dict[str, bytes | Path] = {
        CARD: card(loaded, source=repository, shown=shown).encode(),
        MANIFEST: folder / MANIFEST,
        **{name: folder / name for name in shown},
        **{f"{a.folder.name}/{WEIGHTS}": a.folder / WEIGHTS for a in loaded.all_adapters},
    }
    exists, in_repository = _remote(repository, revision, private) if ask_hub else (False, [])
    return Publication(
        repository=repository,
        revision=revision,
        private=private,
        exists=exists,
        files=files,
        stale=tuple(name for name in in_repository if PurePosixPath(name).name == WEIGHTS and name not in files),
        notes=tuple(
            f"note: the reward of {adapter.name!r}, {name}, is {what} and is not sent; others can draw images with the "
            "set, and cannot evaluate it by this reward unless you give it to them"
            for adapter in loaded.all_adapters
            for name, what in local_parts(adapter.objective.reward)
        ),
    )


def check_publishable(loaded: AdapterSet) -> None:
    """Raise ValueError unless others can load the base and the licence of each adapter is stated."""
    base = loaded.base["name_or_path"]
    if parse_id(base) is None and base not in emoji.BASES:
        raise ValueError(
            f"the set's base is {base!r}, a folder that others do not have; publish the base, and create the set anew "
            "with --base OWNER/NAME"
        )
    for adapter in loaded.all_adapters:
        if not adapter.license:
            raise ValueError(
                f"the licence of adapter {adapter.name!r} is not stated; say it: stepfuse set card SET --license ID"
            )


def check_secrets(manifest: Path) -> None:
    """Raise ValueError for an address with a password in what training recorded."""
    if found := re.search(r"[a-z]+://[^/\s\"@]+@(?P<host>[^/\s\"]+)", read_text(manifest)):
        raise ValueError(
            f"{manifest} has an address at {found['host']} with a name or password in it, which would be public; "
            "take it out, or train with the reward at a plain address"
        )


def publish(publication: Publication) -> str:
    """Send it in one commit, and return the address of the commit.

    The weights go first, one file after another: repeated after an interruption, what had arrived is not sent again.

    Raises:
        ValueError: where the hub cannot be reached or does not take it.
    """
    api = HfApi()
    repository, branch = publication.repository, publication.revision
    with hub_errors(repository):
        if not publication.exists:
            api.create_repo(repository, private=publication.private, exist_ok=True)
        if branch != DEFAULT:
            api.create_branch(repository, branch=branch, exist_ok=True)
        added = [CommitOperationAdd(name, content) for name, content in publication.files.items()]
        for operation in added:
            if PurePosixPath(operation.path_in_repo).name == WEIGHTS:
                api.preupload_lfs_files(repository, [operation], revision=branch)
        deleted = [CommitOperationDelete(name) for name in publication.stale]
        names = ", ".join(sorted({PurePosixPath(name).parts[0] for name in publication.files if "/" in name}))
        message = f"Adapter set: {names}"
        done = api.create_commit(repository, [*added, *deleted], commit_message=message, revision=branch)
    return str(done.commit_url)


def confirmed(publication: Publication) -> bool:
    """Ask at the terminal; ValueError where standard input is not a terminal."""
    if not sys.stdin.isatty():
        raise ValueError("no terminal to confirm at; pass --yes to send it, or --dry_run to list what would be sent")
    return input(f"Send to {publication.repository}? [y/N] ").strip().lower() in ("y", "yes")


def check_token() -> None:
    """Raise ValueError where there is no token of the hub; it is never shown."""
    if not get_token():
        raise ValueError("no token of the hub; log in: `hf auth login`, or set HF_TOKEN")


def _remote(repository: str, branch: str, private: bool) -> tuple[bool, list[str]]:
    """Whether the repository is there, and the files of its branch."""
    api = HfApi()
    with hub_errors(repository):
        try:
            info = api.model_info(repository)
        except RepositoryNotFoundError:
            return False, []
        if private and not info.private:
            raise ValueError(
                f"{repository} is there and is public; make it private on its page, or leave out --private"
            )
        try:
            return True, api.list_repo_files(repository, revision=branch)
        except RevisionNotFoundError:
            return True, []
