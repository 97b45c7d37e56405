"""A request that was checked against its set: what the engine draws, and how its pictures describe themselves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from torch import Tensor

from stepfuse.data.names import nearest
from stepfuse.data.seeds import numbered_generator
from stepfuse.fuse.backbones.denoiser import ForwardRows
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.rules.registry import get_default_rule, get_rule
from stepfuse.fuse.rules.weight_table import weight_table
from stepfuse.fuse.rules.weights import Weights, WeightSchedule
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.scripts.serve.drawing import Drawing
from stepfuse.scripts.serve.errors import RequestError
from stepfuse.scripts.serve.served_sets import ServedSet, guidance_of

Predict = Callable[[Sequence[ForwardRows]], list[Latents]]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that can be drawn.

    Attributes:
        steps: of denoising.
        size: height and width in pixels.
        sampler: under the rule and guidance of the request.
    """

    drawing: Drawing
    served: ServedSet
    sampler: FusedSampler
    weights: tuple[Weights, ...]
    steps: int
    size: tuple[int, int]

    def settings(self, index: int) -> dict[str, Any]:
        """What the image of an index was drawn with, each as it can be sent again."""
        asked, guidance = self.drawing, self.sampler.denoiser.guidance
        weights = self.weights[index if asked.per_image else 0]
        return {
            "stepfuse": version("stepfuse"),
            "set": self.served.name,
            "prompt": asked.prompt,
            "negative_prompt": asked.negative_prompt,
            "weights": _exact_text(weights) if _has_schedule(weights) else dict(weights),
            "strength": asked.strength,
            "rule": self.sampler.rule.name,
            "rule_options": dict(asked.rule_options),
            "weights_on": asked.weights_on,
            "seed": asked.seeds[index],
            "steps": self.steps,
            "guidance": guidance.source,
            "guidance_scale": guidance.scale,
            "width": self.size[1],
            "height": self.size[0],
        }

    def settings_of_all(self) -> dict[str, Any]:
        """Of the one picture of a strip or a loop."""
        asked, first = self.drawing, self.settings(0)
        several = {"weights": [self.settings(index)["weights"] for index in range(asked.count)]}
        more = several if asked.per_image else {"n": asked.count}
        return first | more | {"layout": asked.layout}

    def draw(self, predict: Predict, notify: Callable[[int, int, int], None] = lambda *_: None) -> Tensor:
        """Pixels in [0, 1].

        Args:
            predict: runs the forwards.
            notify: called after each step, with the steps done, the steps there are and 0.
        """
        asked = self.drawing
        denoiser = replace(self.sampler.denoiser, forward_fn=predict)
        done = 0

        def observe(step: Any, gaussian: Gaussian, *_: object) -> None:
            nonlocal done
            done += 1
            notify(done, self.steps, 0)

        with _errors_of(self.served):
            pixels = replace(self.sampler, denoiser=denoiser).sample(
                [asked.prompt] * asked.count,
                [self.served.inner(weights) for weights in self.weights],
                strength=asked.strength,
                weights_on=asked.weights_on,
                num_inference_steps=self.steps,
                generator=[numbered_generator(seed, 0) for seed in asked.seeds],
                negative_prompt=asked.negative_prompt,
                height=self.size[0],
                width=self.size[1],
                batch_size=asked.count,
                output_type="pt",
                progress=False,
                observe=observe,
                report_cuts=False,
            )
        assert isinstance(pixels, Tensor)
        return pixels


def prepare(drawing: Drawing, sets: Mapping[str, ServedSet], max_rows: int) -> Prepared:
    """Check a request against its set; a `RequestError` says what is wrong. Nothing is computed."""
    served = _set_of(drawing, sets)
    names = served.loaded.names
    weights = drawing.weights or (served.loaded.default_weights,)
    with _errors_of(served, "weights"):
        weight_table(weights, names)
    with _errors_of(served, "size"):
        size = served.sampler.backbone.size(*(drawing.size or (None, None)))
        shape = served.sampler.backbone.shape(*size)
    with _errors_of(served, "rule_options" if drawing.rule_options else "rule"):
        sampler = served.sampler.with_rule(_rule_of(drawing, served))
    with _errors_of(served, "guidance_scale"):
        guidance = guidance_of(served, drawing.guidance, drawing.guidance_scale)
        # Prompts and images one at a time, so that they do not depend on the others of the request.
        denoiser = replace(sampler.denoiser, guidance=guidance, batch_invariant=True, rows_at_once=max_rows)
        sampler = replace(sampler, denoiser=denoiser)
    with _errors_of(served):
        plan = sampler.plan(
            [served.inner(each) for each in weights],
            drawing.count,
            strength=drawing.strength,
            weights_on=drawing.weights_on,
            num_inference_steps=drawing.steps,
            shape=shape,
        )
    return Prepared(drawing=drawing, served=served, sampler=sampler, weights=weights, steps=len(plan.steps), size=size)


def _set_of(drawing: Drawing, sets: Mapping[str, ServedSet]) -> ServedSet:
    if drawing.model is None:
        if len(sets) > 1:
            raise RequestError(
                message=f"the field 'model' is missing; expected one of {', '.join(sets)}", param="model"
            )
        return next(iter(sets.values()))
    if drawing.model not in sets:
        raise RequestError(
            status=404,
            message=f"no set {drawing.model!r} here; expected one of {', '.join(sets)}{nearest(drawing.model, sets)}",
            param="model",
            code="model_not_found",
        )
    return sets[drawing.model]


def _rule_of(drawing: Drawing, served: ServedSet) -> Any:
    """The rule of a request, one of those that the server accepts; never a file."""
    if drawing.rule is not None and drawing.rule not in served.rules:
        message = (
            f"no rule {drawing.rule[:100]!r} here; expected one of {', '.join(served.rules)}, the rules that need no "
            f"rewards while sampling{nearest(drawing.rule, served.rules)}"
        )
        raise RequestError(message=message, param="rule")
    if drawing.rule is None:
        return get_default_rule(served.loaded.default_rule, **drawing.rule_options)
    return get_rule(drawing.rule, **drawing.rule_options)


@contextmanager
def _errors_of(served: ServedSet, param: str | None = None) -> Iterator[None]:
    """Answer a ValueError of the sampler as a fault of the request."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise RequestError(message=served.outer(str(error)), param=param) from error


def _exact_text(weights: Weights) -> str:
    """As `parse_weights` reads them, with all digits, and no exponents, whose sign would be taken for a range's."""
    return ",".join(f"{name}={_pieces(weight)}" for name, weight in weights.items())


def _pieces(weight: float | WeightSchedule) -> str:
    if isinstance(weight, WeightSchedule):
        return ",".join(f"{_digits(w)}@{_digits(begin)}-{_digits(end)}" for w, begin, end in weight.pieces)
    return repr(weight)


def _digits(number: float) -> str:
    return f"{number:.20f}".rstrip("0").rstrip(".")


def _has_schedule(weights: Weights) -> bool:
    return any(isinstance(weight, WeightSchedule) for weight in weights.values())
