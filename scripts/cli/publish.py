"""`stepfuse publish`."""

from typing import TYPE_CHECKING

from stepfuse.data.stages import import_libraries
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.parser import Arguments, Parser, option

if TYPE_CHECKING:
    from stepfuse.fuse.sets.publish import Publication
    from stepfuse.fuse.sets.space import Space

SPACE = (
    "Write a Docker Space that runs `stepfuse serve` on the set, after the set itself; for a SET that is on the hub "
    "already, the Space alone (default: no Space)."
)


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse publish outputs/set OWNER/NAME --private")
    declare.adapter_set(parser, "Folder of the adapter set; with --space also OWNER/NAME@REVISION, a set on the hub.")
    text = "Repository on the hub; it is created if it does not exist."
    option(parser, "repository", str, text, metavar="OWNER/NAME", nargs="?")
    option(parser, "--private", bool, "Create repository and Space as private ones (default: public).")
    text = "Branch to upload to; it is created if it does not exist."
    option(parser, "--revision", str, text, metavar="BRANCH", default="main")
    option(parser, "--space", str, SPACE, metavar="OWNER/NAME")
    text = (
        "What pip installs in the Space, such as git+https://HOST/REPOSITORY@COMMIT for a version that is not released "
        "(default: the release of this version)."
    )
    option(parser, "--package", str, text, metavar="REQUIREMENT")
    text = "Build of torch in the Space: cpu, or such as cu128 for hardware with a GPU."
    option(parser, "--torch", str, text, metavar="BUILD", default="cpu")
    option(parser, "--dry_run", bool, "Only list what would be uploaded; needs no token (default: upload).")
    option(parser, "--yes", bool, "Upload without asking (default: ask first).")


def run(arguments: Arguments) -> None:
    check_set(arguments.set)
    _check_form(arguments)

    import_libraries()

    from stepfuse.fuse.sets.publish import check_token, confirmed, prepare, publish

    if not arguments.dry_run:
        check_token()
    publication, space, commit = None, None, None
    if arguments.repository is not None:
        publication = prepare(
            arguments.set,
            arguments.repository,
            revision=arguments.revision,
            private=arguments.private,
            ask_hub=not arguments.dry_run,
        )
    if arguments.space is not None:
        space, commit = _prepare_space(arguments, publication)
    sent = [one for one in (publication, space and space.publication(commit)) if one]
    print(*sent, sep="\n")
    if arguments.dry_run and space is not None:
        print(*(f"\n{name}:\n\n{text}" for name, text in space.texts(commit).items()), sep="\n")
    if arguments.dry_run or not (arguments.yes or confirmed(" and ".join(one.where for one in sent))):
        print("nothing was sent")
        return
    if publication is not None:
        done = publish(publication)
        print(done.commit_url)
        commit = done.oid
    if space is not None:
        try:
            print(publish(space.publication(commit)).repo_url)
        except ValueError as error:
            again = f"stepfuse publish {space.repository}@{commit} --space {space.name}"
            raise ValueError(f"{error} (the set is there; the Space alone: {again})") from error


def _check_form(arguments: Arguments) -> None:
    """Raise ValueError for anything but a set, a set and its Space, or the Space of a set on the hub."""
    if arguments.repository is None:
        if arguments.space is None:
            raise ValueError(f"publish {arguments.set} where? Give a repository, OWNER/NAME")
        if arguments.set.exists() or "/" not in str(arguments.set):
            raise ValueError(
                f"the Space can load {str(arguments.set)!r} from the hub only; publish it too: stepfuse publish "
                f"{arguments.set} OWNER/NAME --space {arguments.space}"
            )
        if arguments.revision != "main":
            raise ValueError(f"--revision {arguments.revision} without a repository; expected SET@{arguments.revision}")
    if arguments.space is None and (arguments.package or arguments.torch != "cpu"):
        raise ValueError("--package and --torch belong to a Space; give --space OWNER/NAME")


def _prepare_space(arguments: Arguments, publication: "Publication | None") -> "tuple[Space, str | None]":
    """The Space, and the commit of its set if it is on the hub already."""
    from stepfuse.fuse.sets.adapter_set import read_manifest, set_folder
    from stepfuse.fuse.sets.hub import find_set
    from stepfuse.fuse.sets.space import prepare_space

    given = {
        "package": arguments.package,
        "torch": arguments.torch,
        "private": arguments.private,
        "ask_hub": not arguments.dry_run,
    }
    if publication is not None:
        loaded, repository = read_manifest(set_folder(arguments.set)), publication.repository
        space = prepare_space(arguments.space, loaded, repository, restricted=publication.private, **given)
        return space, None
    found = find_set(str(arguments.set))
    loaded = read_manifest(found.manifest.parent)
    space = prepare_space(arguments.space, loaded, found.repository, restricted=found.restricted, **given)
    return space, found.commit
