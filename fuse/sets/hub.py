"""Sets on the hub: found by `owner/name` or `owner/name@revision`, looked at before they are fetched."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, ModelInfo, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from stepfuse.data.text_files import first_line
from stepfuse.fuse.lora.safe_files import WEIGHTS, check_no_pickle
from stepfuse.fuse.sets.manifest import MANIFEST, SHOWN, adapter_entries, check_schema, read_versioned
from stepfuse.fuse.sets.wrong_source import PIPELINE, base_model, known_base

ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")
UNREACHABLE = "{name}: the hub cannot be reached ({reason}); try again"
HUB_ERRORS: dict[type[Exception], str] = {  # the first that an error is an instance of
    RevisionNotFoundError: "{name}: the repository has no such revision; give a branch, tag or commit",
    GatedRepoError: "{name} is gated: accept its terms on its page, and log in: `hf auth login`",
    RepositoryNotFoundError: "{name} is no folder here and no repository on the hub that can be seen; check the name, "
    "or, if it is private, log in: `hf auth login`",
    EntryNotFoundError: "{name}: {reason}",
    HFValidationError: "{name} is no hub id: {reason}",
    HfHubHTTPError: "{name}: the hub answers: {reason}",
    ConnectionError: UNREACHABLE,  # of hf_xet; OfflineModeIsEnabled is one
    HTTPError: UNREACHABLE,
}


def parse_id(name: str) -> tuple[str, str | None] | None:
    """`owner/name@revision` → repository and revision; None for other text."""
    match = ID.fullmatch(name)
    return (match["repository"], match["revision"]) if match else None


def check_lora(source: str) -> None:
    """Raise ValueError for a LoRA that is neither a path here nor a hub id."""
    if not Path(source).exists() and parse_id(source) is None:
        raise ValueError(f"no LoRA at {source!r}; expected a safetensors file, a folder of a peft adapter, or a hub id")


def fetch_set(name: str) -> Path:
    """The folder of a set in the hub's cache, downloaded if it is not there; an interrupted download is resumed.

    The list of the repository's files is checked first: a pickle in it, or a malformed manifest, is refused before any
    weights are downloaded. Without a connection a set downloaded before is found again.

    Raises:
        ValueError: for a repository, revision or manifest that is not there or may not be read, or a pickle.
    """
    repository, revision = parse_id(name) or (name, None)
    with hub_errors(name):
        try:
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        except (OfflineModeIsEnabled, HTTPError) as error:
            if isinstance(error, HfHubHTTPError):  # it answered
                raise
            cached = try_to_load_from_cache(repository, MANIFEST, revision=revision)
            if not isinstance(cached, str):
                known = known_base(name)
                if known or isinstance(try_to_load_from_cache(repository, PIPELINE, revision=revision), str):
                    raise ValueError(base_model(name, known)) from error
                raise ValueError(
                    f"no folder {name!r}, and the hub cannot be asked for a repository of this name "
                    f"({first_line(error)}); expected an adapter set, which `stepfuse set create` makes of adapters"
                ) from error
            return Path(cached).parent
        found = _published(name, info)
        hf_hub_download(repository, MANIFEST, revision=revision)  # so that the cache knows what `revision` is
        wanted = [MANIFEST, *SHOWN, *_weights_of(name, found.manifest, found.sizes)]
        return Path(snapshot_download(repository, revision=found.commit, allow_patterns=wanted))


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """A set in a repository of the hub, at one commit.

    Attributes:
        repository: `owner/name`.
        commit: the hash.
        restricted: private, or gated by terms: it is not fetched without a token.
        manifest: the file, in the hub's cache.
        sizes: of the files in bytes.
    """

    repository: str
    commit: str
    restricted: bool
    manifest: Path
    sizes: Mapping[str, int | None]


def find_set(name: str) -> PublishedSet:
    """Look a set up on the hub and fetch its manifest, without the weights.

    Raises:
        ValueError: for a repository, revision or manifest that is not there or may not be read, or a pickle.
    """
    repository, revision = parse_id(name) or (name, None)
    with hub_errors(name):
        return _published(name, HfApi().model_info(repository, revision=revision, files_metadata=True))


def _published(name: str, info: ModelInfo) -> PublishedSet:
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    for file in sizes:
        check_no_pickle(PurePosixPath(name, file))
    if MANIFEST not in sizes:
        if PIPELINE in sizes:
            raise ValueError(base_model(name))
        raise ValueError(f"{name!r} has no {MANIFEST}: it is no adapter set; `stepfuse set import` takes one LoRA")
    commit = str(info.sha)
    return PublishedSet(
        repository=info.id,
        commit=commit,
        restricted=bool(info.private or info.gated),
        manifest=Path(hf_hub_download(info.id, MANIFEST, revision=commit)),
        sizes=sizes,
    )


def _weights_of(name: str, manifest: Path, sizes: Mapping[str, int | None]) -> list[str]:
    """The weights that a manifest names, checked to be there and as large as it says."""
    values = read_versioned(manifest, "an adapter set")
    check_schema(manifest, values)
    expected = {f"{entry['folder']}/{WEIGHTS}": entry["weights"]["bytes"] for entry in adapter_entries(values)}
    for file, size in expected.items():
        if sizes.get(file) != size:
            there = f"{sizes[file]:,} bytes" if sizes.get(file) else "nothing"
            raise ValueError(f"{name!r} has {there} at {file}, and its manifest says {size:,} bytes: it is damaged")
    return list(expected)


def fetch_lora(name: str, weight_name: str | None) -> Path:
    """The one safetensors file of a repository, or the one that is named; ValueError where it is not there."""
    repository, revision = parse_id(name) or (name, None)
    with hub_errors(name):
        info = HfApi().model_info(repository, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        found = [file for file in names if file.endswith(".safetensors")]
        if weight_name is None and len(found) == 1:
            weight_name = found[0]
        if weight_name not in found:
            listed = ", ".join(found[:10]) or "none"
            raise ValueError(f"{name!r} has these safetensors files: {listed}; choose one with --weight_name")
        file = Path(hf_hub_download(repository, weight_name, revision=info.sha))
        config = str(PurePosixPath(weight_name).with_name("adapter_config.json"))
        if config in names and file.name == "adapter_model.safetensors":
            return Path(hf_hub_download(repository, config, revision=info.sha)).parent
        return file


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn errors of the hub into a ValueError of one line."""
    try:
        yield
    except tuple(HUB_ERRORS) as error:
        message = next(text for kind, text in HUB_ERRORS.items() if isinstance(error, kind))
        raise ValueError(message.format(name=repr(name), reason=first_line(error))) from error
    except RuntimeError as error:  # of huggingface_hub, for uploads that fail again and again
        if "uploading" not in str(error):
            raise
        raise ValueError(f"{name!r}: {first_line(error)} Try again: what arrived whole is not sent again") from error
