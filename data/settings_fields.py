"""Fields of settings dataclasses that are options too: their help, bounds and names. Importing this is cheap."""

import dataclasses
import math
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stepfuse.data.names import nearest
from stepfuse.data.seeds import LIMIT

# For argparse, whose pattern matches -1 and -0.5 but takes -1e-3 for a flag.
NEGATIVE_NUMBER = re.compile(r"^-(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The numbers that a setting accepts: finite, from `least` to `most`.

    Attributes:
        above: Whether `least` itself is excluded.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        if self.most == LIMIT - 1:
            return f"a whole number from {self.least} to 2^64 - 1"
        if self.most < math.inf:
            least = f"above {self.least:g}, up to" if self.above else f"from {self.least:g} to"
            return f"a number {least} {self.most:g}"
        return f"{self.least:g} or more" if self.least > -math.inf else "a finite number"


AT_LEAST_0, AT_LEAST_1, FINITE = Bounds(0), Bounds(1), Bounds()
SEED = Bounds(0, LIMIT - 1)


def setting(default: Any, group: str, help_text: str, *, bounds: Bounds | None = None, **more: Any) -> Any:
    """Declare a field of a settings dataclass that is also an option of a command.

    Args:
        group: Heading that `--help` lists the option under.
        help_text: What `--help` says of the option. The default is added by the parser.
        bounds: Of a number, or of each of several.
        more: Of these, if any: `known`, the accepted names of a text or of each of several, besides the default;
            `metavar`, the name of the value in `--help`; `aliases`, other names of the option.
    """
    metadata = {"group": group, "help": help_text, "bounds": bounds} | more
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(settings: Any) -> None:
    """Check each field of a dataclass against its Literal, or the bounds and names that `setting` declares for it.

    Raises:
        ValueError: For a number out of bounds and an unknown name, with the nearest one.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, bounds = getattr(settings, field.name), field.metadata.get("bounds")
        known = field.metadata.get("known") or literal_choices(hints[field.name])
        several = isinstance(value, tuple)
        for item in value if several else (value,):
            if bounds is not None and item is not None and item not in bounds:
                shown = ",".join(map(str, value)) if several else value
                raise ValueError(f"{field.name} {shown}; expected {'numbers of ' if several else ''}{bounds}")
            if known and item not in known and item != field.default:
                expected = f"expected {'some' if several else 'one'} of {', '.join(known)}{nearest(str(item), known)}"
                raise ValueError(f"{field.name} {item!r}; {expected}")


def literal_choices(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal, or of one that may also be None."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for inner in get_args(hint) if get_origin(inner) is Literal for choice in get_args(inner))
