"""Fusion rules from files of the user: what is checked of them, and their errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from stepfuse.data.out_of_memory import is_out_of_memory
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.rewards.user_code import user_line

METHODS = ("fuse", "denoise")  # either replaces the other methods
PARTS = ("networks", "combine")  # of which the default `fuse` consists


def check_methods(rule: FusionRule) -> None:
    """Raise ValueError for a rule that defines neither `fuse` nor what it consists of."""

    def defined(method: str) -> bool:
        return getattr(type(rule), method) is not getattr(FusionRule, method)

    if not any(map(defined, METHODS)) and not all(map(defined, PARTS)):
        raise ValueError(f"the rule {rule.name!r} has no method `fuse`; expected `fuse`, or `networks` and `combine`")


@contextmanager
def one_line_errors(rule: FusionRule) -> Iterator[None]:
    """Turn an exception that a file of the user raises into a ValueError that names the rule, the file and the line.

    Errors of a failed allocation pass as they are, since what helps depends on the program.
    """
    try:
        yield
    except Exception as error:  # user code can raise any exception
        line = user_line(error)
        if not line or is_out_of_memory(error):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"the rule {rule.name!r}: {kind}{' '.join(str(error).split())} ({line})") from error
