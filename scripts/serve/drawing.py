"""A request for images, read from JSON and checked: `POST /v1/images/generations`."""

import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stepfuse.data.names import nearest
from stepfuse.data.seeds import LIMIT
from stepfuse.data.text_files import short_repr
from stepfuse.fuse.backbones.guidance import GUIDANCE
from stepfuse.fuse.rules.weights import Weights, parse_weights
from stepfuse.scripts.serve.errors import RequestError

FORMATS = ("png", "webp", "jpeg", "gif")
LAYOUTS = ("images", "strip", "loop")
# Fields of OpenAI's API for what is not done here, with the values that ask for nothing.
WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "user": (),  # anything
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "output_compression": (100,),
    "partial_images": (0,),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for.

    Attributes:
        images: the most images, `n`.
        frames: the most mixtures in a list of weights.
        steps: the most denoising steps.
        prompt_characters: of a prompt, and of a negative one.
        pixels: the most pixels of an image, height times width.
    """

    images: int = 16
    frames: int = 64
    steps: int = 200
    prompt_characters: int = 4000
    pixels: int = 2**22


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What a request asks for.

    Attributes:
        model: the set's name; None where only one is served.
        size: height and width in pixels; None for the set's.
        weights: one mixture for all images, or one an image; None for the set's.
        seed: of the first image. Images of a list of weights share it, others count up from it.
        low: drawn only with what requests of normal priority leave.
    """

    model: str | None
    prompt: str
    count: int
    size: tuple[int, int] | None
    output_format: str
    stream: bool
    weights: tuple[Weights, ...] | None
    per_image: bool
    strength: float
    rule: str | None
    rule_options: Mapping[str, Any] = field(default_factory=dict)
    weights_on: str
    seed: int
    steps: int | None
    guidance: str | None
    guidance_scale: float | None
    negative_prompt: str | None
    low: bool
    layout: str

    @property
    def seeds(self) -> list[int]:
        return [(self.seed + (0 if self.per_image else index)) % LIMIT for index in range(self.count)]


def read_drawing(body: Any, limits: Limits) -> Drawing:
    """A request's JSON, checked as far as it can be without the model; a `RequestError` names the field."""
    if not isinstance(body, dict):
        raise RequestError(message=f"the request is {short_repr(body)}; expected a JSON object")
    given = {name: value for name, value in body.items() if value is not None}  # null is as if it were left out
    for name, allowed in WITHOUT_EFFECT.items():
        value = given.pop(name, None)
        if value is not None and allowed and value not in allowed:
            raise _wrong(name, value, f"{' or '.join(map(str, allowed))}, for it has no effect here")
    known = [*_FIELDS, *WITHOUT_EFFECT]
    for name in given:
        if name not in _FIELDS:
            raise RequestError(message=f"unknown field {short_repr(name)}{nearest(name, known)}", param=str(name)[:100])
    if "prompt" not in given:
        raise RequestError(message="the field 'prompt' is missing; expected a text", param="prompt")
    values: dict[str, Any] = {
        name: read(given[name], name, limits) if name in given else None for name, read in _FIELDS.items()
    }
    weights, several = values["weights"] or ((), False)
    count = values["n"] or (len(weights) if several else 1)
    if several and count != len(weights):
        raise _wrong("n", count, f"{len(weights)}, the number of mixtures in 'weights', or none")
    layout = values["layout"] or "images"
    output_format = values["output_format"] or ("gif" if layout == "loop" else "png")
    formats = ("gif", "webp") if layout == "loop" else FORMATS[:3]
    if output_format not in formats:
        raise _wrong("output_format", output_format, f"{' or '.join(formats)} for the layout {layout}")
    strength = values["strength"]
    return Drawing(
        model=values["model"],
        prompt=values["prompt"],
        count=count,
        size=values["size"],
        output_format=output_format,
        stream=bool(values["stream"]),
        weights=weights or None,
        per_image=several,
        strength=1.0 if strength is None else strength,
        rule=values["rule"],
        rule_options=values["rule_options"] or {},
        weights_on=values["weights_on"] or "exponents",
        seed=secrets.randbelow(2**32) if values["seed"] is None else values["seed"],
        steps=values["steps"],
        guidance=values["guidance"],
        guidance_scale=values["guidance_scale"],
        negative_prompt=values["negative_prompt"],
        low=values["priority"] == "low",
        layout=layout,
    )


def _wrong(name: str, value: object, expected: str) -> RequestError:
    return RequestError(message=f"{name} is {short_repr(value)}; expected {expected}", param=name)


def _text(value: Any, name: str, limits: Limits) -> str:
    most = limits.prompt_characters
    if not isinstance(value, str):
        raise _wrong(name, value, "a text")
    if len(value) > most:
        raise RequestError(
            message=f"{name} has {len(value):,} characters; expected at most {most:,}", param=name, code="too_long"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong(name, value, "text without lone surrogates, which are no characters") from None
    return value


def _whole(least: int, most: Callable[[Limits], int]) -> Callable[[Any, str, Limits], int]:
    def read(value: Any, name: str, limits: Limits) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most(limits):
            raise _wrong(name, value, f"a whole number from {least} to {most(limits)}")
        return value

    return read


def _number(value: Any, name: str, least: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise _wrong(name, value, "a finite number" + (f", {least:g} or more" if least > -math.inf else ""))
    try:
        return float(value)
    except OverflowError:
        raise _wrong(name, value, "a finite number") from None


def _one_of(*names: str) -> Callable[[Any, str, Limits], str]:
    def read(value: Any, name: str, limits: Limits) -> str:
        if value not in names:
            raise _wrong(name, value, f"{'one of ' if len(names) > 1 else ''}{', '.join(names)}{nearest(value, names)}")
        return str(value)

    return read


def _flag(value: Any, name: str, limits: Limits) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _size(value: Any, name: str, limits: Limits) -> tuple[int, int] | None:
    """`WIDTHxHEIGHT` → height and width."""
    if value == "auto":
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", value) if isinstance(value, str) else None
    if match is None:
        raise _wrong(name, value, "WIDTHxHEIGHT in pixels, such as 512x512, or auto")
    width, height = int(match[1]), int(match[2])
    if width * height > limits.pixels:
        raise _wrong(name, value, f"at most {limits.pixels:,} pixels, width times height")
    return height, width


def _weights(value: Any, name: str, limits: Limits) -> tuple[tuple[Weights, ...], bool]:
    """One mixture, or a list of them, and whether it is a list."""
    if not isinstance(value, list):
        return (_mixture(value),), False
    if not 1 <= len(value) <= limits.frames:
        raise RequestError(
            message=f"weights is a list of {len(value)} mixtures; expected 1 to {limits.frames}", param=name
        )
    return tuple(map(_mixture, value)), True


def _mixture(value: Any) -> Weights:
    if isinstance(value, str) and len(value) < 10_000:
        try:
            return parse_weights(value)
        except ValueError as error:
            raise RequestError(message=str(error), param="weights") from None
    if not isinstance(value, dict) or not value or len(value) > 1000:
        expected = 'a mapping from objectives to weights, {"a": 0.7, "b": 0.3} for instance, or a list of such mappings'
        raise _wrong("weights", value, expected)
    return {name: _number(weight, f"the weight of {short_repr(name)}") for name, weight in value.items()}


def _options(value: Any, name: str, limits: Limits) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > 20:
        raise _wrong(name, value, 'the options of the rule, {"gate": 0.4} for instance')
    return value


_FIELDS: dict[str, Callable[[Any, str, Limits], Any]] = {
    "model": _text,
    "prompt": _text,
    "n": _whole(1, lambda limits: limits.images),
    "size": _size,
    "response_format": _one_of("b64_json"),
    "output_format": _one_of(*FORMATS),
    "stream": _flag,
    "weights": _weights,
    "strength": lambda value, name, limits: _number(value, name, 0),
    "rule": _text,
    "rule_options": _options,
    "weights_on": _one_of("exponents", "rewards"),
    "seed": _whole(0, lambda limits: LIMIT - 1),
    "steps": _whole(1, lambda limits: limits.steps),
    "guidance": _one_of(*GUIDANCE),
    "guidance_scale": lambda value, name, limits: _number(value, name),
    "negative_prompt": _text,
    "priority": _one_of("normal", "low"),
    "layout": _one_of(*LAYOUTS),
}
