"""`stepfuse publish`: a set, checked, with its card, in one commit of a repository of the hub.

The Space that runs it is sent the same way: `space.py`.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
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
        private: the repository is, or is made, private.
        exists: the repository is there already.
        files: contents by the path they will have.
        stale: files in the repository that an earlier publication sent and this one does not have.
        message: of the commit.
        notes: on what is not sent or what is left to do, a line each.
        space: the repository is a Docker Space, not a model.
    """

    repository: str
    revision: str
    private: bool
    exists: bool
    files: dict[str, bytes | Path]
    stale: tuple[str, ...]
    message: str
    notes: tuple[str, ...] = ()
    space: bool = False

    @property
    def where(self) -> str:
        return f"the Space {self.repository}" if self.space else self.repository

    def __str__(self) -> str:
        sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in self.files.items()}
        what = f"a new {'private' if self.private else 'public'} {'Docker Space' if self.space else 'repository'}"
        where = f"{self.where}, branch {self.revision}" + ("" if self.exists else f" ({what})")
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
    found = _remote(repository, revision=revision, private=private) if ask_hub else None
    in_repository = found.files if found else ()
    names = ", ".join(sorted({PurePosixPath(name).parts[0] for name in files if "/" in name}))
    return Publication(
        repository=repository,
        revision=revision,
        private=found.private if found else private,
        exists=found is not None,
        files=files,
        stale=tuple(name for name in in_repository if PurePosixPath(name).name == WEIGHTS and name not in files),
        message=f"Adapter set: {names}",
        notes=tuple(
            f"note: the reward of {adapter.name!r}, {name}, is {what} and is not sent; others can generate images with "
            "the set, and cannot evaluate it by this reward unless you give it to them"
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


def publish(publication: Publication) -> CommitInfo:
    """Send it in one commit, and return that: its `commit_url` is its address, its `oid` the hash.

    The weights go first, one file after another: repeated after an interruption, what had arrived is not sent again.

    Raises:
        ValueError: where the hub cannot be reached or does not take it.
    """
    api = HfApi()
    repository, branch = publication.repository, publication.revision
    kind, sdk = ("space", "docker") if publication.space else ("model", None)
    with hub_errors(repository):
        if not publication.exists:
            private = publication.private
            api.create_repo(repository, private=private, exist_ok=True, repo_type=kind, space_sdk=sdk)
        if branch != DEFAULT:
            api.create_branch(repository, branch=branch, exist_ok=True, repo_type=kind)
        added = [CommitOperationAdd(name, content) for name, content in publication.files.items()]
        for operation in added:
            if PurePosixPath(operation.path_in_repo).name == WEIGHTS:
                api.preupload_lfs_files(repository, [operation], revision=branch, repo_type=kind)
        deleted = [CommitOperationDelete(name) for name in publication.stale]
        return api.create_commit(
            repository,
            [*added, *deleted],
            commit_message=publication.message,
            revision=branch,
            repo_type=kind,
        )


def confirmed(where: str) -> bool:
    """Ask at the terminal whether to send it there; ValueError where standard input is not a terminal."""
    if not sys.stdin.isatty():
        raise ValueError("no terminal to confirm at; pass --yes to send it, or --dry_run to list what would be sent")
    return input(f"Send to {where}? [y/N] ").strip().lower() in ("y", "yes")


def check_token() -> None:
    """Raise ValueError where there is no token of the hub; it is never shown."""
    if not get_token():
        raise ValueError("no token of the hub; log in: `hf auth login`, or set HF_TOKEN")


@dataclass(frozen=True, kw_only=True)
class _Remote:
    """A repository that is there: whether it is private, and the files of the branch."""

    private: bool
    files: Sequence[str]


def _remote(repository: str, *, revision: str, private: bool) -> _Remote | None:
    """What a repository of a model holds, None where there is none; ValueError if it is to be private and is public."""
    api = HfApi()
    with hub_errors(repository):
        try:
            info = api.model_info(repository)
        except RepositoryNotFoundError:
            return None
        check_privacy(repository, private=private, is_private=bool(info.private))
        try:
            return _Remote(private=bool(info.private), files=api.list_repo_files(repository, revision=revision))
        except RevisionNotFoundError:
            return _Remote(private=bool(info.private), files=())


def check_privacy(repository: str, *, private: bool, is_private: bool) -> None:
    """Raise ValueError where a private repository is asked for and a public one is there."""
    if private and not is_private:
        raise ValueError(f"{repository} is there and is public; make it private on its page, or leave out --private")
