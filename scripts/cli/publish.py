"""`stepfuse publish`."""

from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.parser import Arguments, Parser, option


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse publish outputs/set OWNER/NAME --private")
    declare.adapter_set(parser, declare.SET_FOLDER)
    text = "Repository on the hub; it is created if it does not exist."
    option(parser, "repository", str, text, metavar="OWNER/NAME")
    option(parser, "--private", bool, "Create the repository as a private one (default: public).")
    text = "Branch to upload to; it is created if it does not exist."
    option(parser, "--revision", str, text, metavar="BRANCH", default="main")
    option(parser, "--dry_run", bool, "Only list what would be uploaded; needs no token (default: upload).")
    option(parser, "--yes", bool, "Upload without asking (default: ask first).")


def run(arguments: Arguments) -> None:
    check_set(arguments.set)

    from stepfuse.fuse.sets.publish import check_token, confirmed, prepare, publish

    if not arguments.dry_run:
        check_token()
    publication = prepare(
        arguments.set,
        arguments.repository,
        revision=arguments.revision,
        private=arguments.private,
        ask_hub=not arguments.dry_run,
    )
    print(publication)
    if not arguments.dry_run and (arguments.yes or confirmed(publication)):
        print(publish(publication))
    else:
        print("nothing was sent")
