"""Prompts that are longer than text encoders take: which, and what of them is cut."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffusers.loaders import TextualInversionLoaderMixin

from stepfuse.data.library_messages import TRUNCATION, without_messages
from stepfuse.fuse.backbones.base import Backbone

SHOWN = 200  # characters of a text in a message
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CutPrompt:
    """A prompt of which a tokenizer drops the end."""

    prompt: str
    tokenizer: str  # the pipeline's name for it, `tokenizer` or `tokenizer_2`
    removed: str
    tokens: int  # of the prompt, with begin and end where the tokenizer adds them
    limit: int  # how many the text encoder takes

    def __str__(self) -> str:
        return (
            f"the end of the prompt {_shortened(self.prompt)!r} is cut: it has {self.tokens} tokens and "
            f"{self.tokenizer} takes {self.limit}; removed: {_shortened(self.removed)!r}"
        )


def cut_prompts(backbone: Backbone, prompts: Iterable[str]) -> list[CutPrompt]:
    """The prompts of which some end is dropped, once a tokenizer, in order and without repetitions."""
    texts, pipeline = list(dict.fromkeys(prompts)), backbone.pipeline
    found = []
    for name, limit in backbone.token_limits().items() if texts else ():
        tokenizer = backbone.tokenizer(name)
        with without_messages(*TRUNCATION):
            converted = texts
            if isinstance(pipeline, TextualInversionLoaderMixin):
                converted = [pipeline.maybe_convert_prompt(text, tokenizer) for text in texts]
            rows = tokenizer(converted, add_special_tokens=False).input_ids
        ends = tokenizer.num_special_tokens_to_add()
        for text, row in zip(texts, rows, strict=True):
            if len(row) + ends > limit:
                removed = tokenizer.decode(row[limit - ends :]).strip()
                tokens = len(row) + ends
                found.append(CutPrompt(prompt=text, tokenizer=name, removed=removed, tokens=tokens, limit=limit))
    return found


def warn_of_cuts(backbone: Backbone, prompts: Sequence[str | None], *, counted: bool = False) -> None:
    """Log what is cut of prompts, a line for each, or if counted in one line how many are and the first of them."""
    texts = {prompt for prompt in prompts if prompt}
    cut = cut_prompts(backbone, [prompt for prompt in prompts if prompt])
    if counted and cut:
        lost = len({each.prompt for each in cut})
        logger.warning("%d of %d prompts are longer than the text encoder takes; %s", lost, len(texts), cut[0])
        return
    for each in cut:
        logger.warning("%s", each)


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
