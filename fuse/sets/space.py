"""`stepfuse publish --space`: a Space of the hub that runs the page of `stepfuse serve` on a published set.

It is a Docker Space: `stepfuse serve` is a program with a page and an API of its own, while the Gradio SDK runs a
Python file, and a static Space runs nothing. The image needs no GPU: the hub's free CPU hardware runs it. The set is
named by its commit, and by default every package by its version: the Space changes when it is published again, and not
when the set is.
"""

import re
from dataclasses import dataclass

from huggingface_hub import HfApi, SpaceInfo
from huggingface_hub.errors import RepositoryNotFoundError

from stepfuse.fuse.sets.adapter_set import AdapterSet
from stepfuse.fuse.sets.hub import hub_errors, parse_id
from stepfuse.fuse.sets.publish import DEFAULT, Publication, check_privacy, check_publishable
from stepfuse.fuse.sets.space_files import CONSTRAINTS, DOCKERFILE, TAG, release, requirement, space_files

TORCH = re.compile(r"cpu|(cu|rocm|xpu)[\d.]*")  # folders of download.pytorch.org/whl
UNKNOWN = "COMMIT"


@dataclass(frozen=True, kw_only=True)
class Space:
    """A Space that can be written once the commit of its set is known.

    Attributes:
        name: `owner/name`.
        repository: of the set, `owner/name`.
        loaded: the set, of which the manifest is enough.
        package: what pip installs.
        torch: the build of torch, `cpu` or such as `cu128`.
        private: the Space is, or is made, private.
        there: the files of a Space that is there already.
        notes: on what is left to do, a line each.
    """

    name: str
    repository: str
    loaded: AdapterSet
    package: str
    torch: str
    private: bool
    there: tuple[str, ...] | None
    notes: tuple[str, ...]

    def publication(self, commit: str | None) -> Publication:
        """The files of the Space that serves a commit of the set; None for one that will be made, to show them."""
        files = self._files(commit)
        of_commit = () if commit else (f"{UNKNOWN} is that of the set, which is sent first",)
        return Publication(
            repository=self.name,
            revision=DEFAULT,
            private=self.private,
            exists=self.there is not None,
            files={name: text.encode() for name, text in files.items()},
            stale=tuple(name for name in self.there or () if name == CONSTRAINTS and name not in files),
            message=f"Serve {self.repository}@{commit or UNKNOWN}",
            notes=(f"it installs {self.package} and torch for {self.torch}", *of_commit, *self.notes),
            space=True,
        )

    def texts(self, commit: str | None) -> dict[str, str]:
        """The files that are written for this Space."""
        return {name: text for name, text in self._files(commit).items() if name != CONSTRAINTS}

    def _files(self, commit: str | None) -> dict[str, str]:
        title, source = self.name.partition("/")[2], (self.repository, commit or UNKNOWN)
        return space_files(title, self.loaded, *source, package=self.package, torch=self.torch)


def prepare_space(
    name: str,
    loaded: AdapterSet,
    repository: str,
    *,
    restricted: bool = False,
    package: str | None = None,
    torch: str = "cpu",
    private: bool = False,
    ask_hub: bool = True,
) -> Space:
    """Check that a Space can run a set, and collect what it is written from; nothing is sent.

    Args:
        loaded: the set, of which the manifest is enough.
        repository: of the set, where it is or will be, `owner/name`.
        restricted: the set is private or gated.
        package: a requirement of pip in place of the release of this version.
        ask_hub: look up whether the Space exists, and whether the base is on the hub.

    Raises:
        ValueError: for a set that others cannot load or whose licences are not stated, a name that is no hub id, a
            Space that is there and is another's or of another SDK, and a requirement that pip would refuse.
    """
    if parse_id(name) != (name, None):
        raise ValueError(f"--space {name!r}; expected OWNER/NAME")
    if not TORCH.fullmatch(torch):
        raise ValueError(f"--torch {torch!r}; expected cpu, or a build of download.pytorch.org/whl such as cu128")
    check_publishable(loaded)
    package = requirement(package) if package else release()
    there = _find_space(name) if ask_hub else None
    if there is not None:
        check_privacy(name, private=private, is_private=bool(there.private))
    locked = [repository] if restricted else []
    base = loaded.base["name_or_path"]
    if ask_hub and parse_id(base) and _is_restricted(base):
        locked.append(base)
    return Space(
        name=name,
        repository=repository,
        loaded=loaded,
        package=package,
        torch=torch,
        private=bool(there.private) if there else private,
        there=tuple(file.rfilename for file in there.siblings or ()) if there else None,
        notes=tuple(
            f"note: {one} is private or gated: the Space starts only with a secret HF_TOKEN, a token that may read it "
            "(Settings on the Space's page)"
            for one in locked
        ),
    )


def _is_restricted(base: str) -> bool:
    """Whether a base is fetched with a token only; ValueError if it is not there."""
    with hub_errors(base):
        info = HfApi().model_info(base)
    return bool(info.private or info.gated)


def _find_space(name: str) -> SpaceInfo | None:
    """The Space of this name, None where there is none; ValueError for one that was not written here."""
    with hub_errors(name):
        try:
            info = HfApi().space_info(name)
        except RepositoryNotFoundError:
            return None
    if info.sdk != "docker":
        raise ValueError(
            f"the Space {name} is there with the SDK {info.sdk} and not docker; choose another name, or delete it"
        )
    tags = (info.card_data.tags if info.card_data else None) or ()
    if TAG not in tags and any(file.rfilename == DOCKERFILE for file in info.siblings or ()):
        raise ValueError(f"the Space {name} is there and was not written by stepfuse; choose another name")
    return info
