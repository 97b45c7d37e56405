"""What a reward is called by, parsed. Importing this module does not import torch."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from stepfuse.data.names import nearest
from stepfuse.rewards.catalogue import REWARDS

TERM = re.compile(
    r"\s*(?P<weight>[0-9.eE+-]+)\s*\*\s*(?P<name>\S.*?)(?:\s*/\s*(?P<scale>[0-9.]+(?:[eE][+-]?[0-9]+)?))?\s*"
)
YAML = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One reward of a weighted sum: w_i r_i / σ_i.

    Attributes:
        name: name of the reward, as `load_reward` takes it.
        weight: w_i, 0 or more.
        scale: σ_i, such as the standard deviation of the reward over images of the base.
    """

    name: str
    weight: float
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RewardName:
    """A reward's name, parsed; whether it exists is known when it is loaded.

    Attributes:
        text: the name as it was given.
        kind: `catalogue`, `NAME` or `NAME:ARGUMENT`; `sum`, `weighted:…`; `function`, `FILE.py:FUNCTION`; `file`, a
            YAML file; or `server`, a URL.
        head: what comes before the first colon: in the catalogue, the name of the reward.
        argument: what comes after it, for example a folder of weights, or the terms of a sum; of a function, its name.
        path: the file of a function, or the YAML file.
    """

    text: str
    kind: Literal["catalogue", "sum", "function", "file", "server"]
    head: str
    argument: str = ""
    path: str = ""

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of a weighted sum (`parse_terms`); any other reward is a sum of one term."""
        return parse_terms(self.argument) if self.kind == "sum" else (Term(name=self.text, weight=1.0),)

    @property
    def objective(self) -> str:
        """The name of an objective that is trained on this reward, if it has no other."""
        if self.kind == "function":
            return self.argument
        return Path(self.path).stem if self.path else self.head.replace(".", "_")


def parse_reward(text: str) -> RewardName:
    """A reward's name, in the one grammar that settings, sets, files and commands share."""
    head, _, argument = text.partition(":")
    if head in ("http", "https"):
        return RewardName(text=text, kind="server", head=head)
    if head == "weighted":
        return RewardName(text=text, kind="sum", head=head, argument=argument)
    path, _, function = text.rpartition(":")
    if path.endswith(".py") and (head.endswith(".py") or head not in REWARDS):
        return RewardName(text=text, kind="function", head=head, argument=function, path=path)
    if text.endswith(YAML) and (head == text or head not in REWARDS):
        return RewardName(text=text, kind="file", head=head, path=text)
    return RewardName(text=text, kind="catalogue", head=head, argument=argument)


def check_catalogued(reward: RewardName) -> None:
    """Raise ValueError for a reward of the catalogue that is not in it, and for a file without its function."""
    if reward.kind != "catalogue" or reward.head in REWARDS:
        return
    if reward.text.endswith(".py"):
        raise ValueError(f"reward {reward.text!r} names no function; expected {reward.text}:function")
    raise ValueError(
        f"no reward {reward.head!r}; expected one of {', '.join(REWARDS)}, path/to/file.py:function, "
        f"path/to/file.yaml or http://HOST:PORT{nearest(reward.head, REWARDS)}"
    )


def parse_terms(text: str) -> tuple[Term, ...]:
    """`0.5*compressibility/0.2 + 0.5*clip_score/6` → its terms, with weights normalised to sum 1.

    Anything else, a negative weight, weights that sum to 0, a scale that is not positive, or a reward that is named
    twice raises ValueError.
    """
    expected = "expected WEIGHT*REWARD/SCALE + WEIGHT*REWARD/SCALE, such as 0.5*compressibility/0.2 + 0.5*clip_score/6"
    terms = []
    for part in re.split(r"\s\+\s", text):
        match = TERM.fullmatch(part)
        try:
            if match is None:
                raise ValueError("no WEIGHT*REWARD")
            term = Term(name=match["name"], weight=float(match["weight"]), scale=float(match["scale"] or 1))
        except ValueError as error:
            raise ValueError(f"weighted reward {text!r} has the term {part!r}; {expected}") from error
        if not 0 <= term.weight < float("inf") or not 0 < term.scale < float("inf"):
            raise ValueError(f"weighted reward {text!r}: {part!r} needs a weight of 0 or more and a positive scale")
        terms.append(term)
    names = [term.name for term in terms]
    total = sum(term.weight for term in terms)
    if len(set(names)) < len(names):
        raise ValueError(f"weighted reward {text!r} names a reward twice")
    if total <= 0:
        raise ValueError(f"weighted reward {text!r} has weights that sum to 0")
    return tuple(replace(term, weight=term.weight / total) for term in terms)


def label_terms(terms: tuple[Term, ...]) -> str:
    """The name of a weighted sum of these terms."""
    return "weighted:" + " + ".join(f"{t.weight!r}*{t.name}/{t.scale!r}" for t in terms)


def check_reward(name: str) -> None:
    """Check that a reward's name is known, or that its file exists."""
    reward = parse_reward(name)
    check_catalogued(reward)
    if reward.path and not Path(reward.path).is_file():
        raise ValueError(f"no reward {name!r}: no file {reward.path!r}")
