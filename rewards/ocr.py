"""Legibility of the text that a prompt asks for (the OCR reward of Flow-GRPO, Liu et al. 2025, arXiv:2505.05470)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.data.images import to_image
from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.text_legibility import legibility, quoted_texts


class OCRReward:
    """r = `legibility` of the text between double quotes in the prompt, read by PP-OCRv6 through rapidocr; 0 to 1.

    What was read is the text of all lines, from top to bottom and left to right, whose confidence is 0.5 or more. The
    recogniser knows Latin, Chinese and Japanese characters. It runs on the CPU with torch's number of threads, and is
    not differentiable. Its models are part of the package.

    Flow-GRPO reads with the English PP-OCR of PaddleOCR 2.9, gives it RGB where it expects BGR, and scales the longer
    side down to 960 pixels, where rapidocr scales the shorter one up to 736. Scores differ where one of them misreads.
    Flow-GRPO counts an error of the recogniser as a reward of 0; here it is raised.

    Raises:
        ValueError: If rapidocr or onnxruntime is not installed, for an argument, and in a call for a prompt without
            quoted text.
    """

    def __init__(self, argument: str | None, device: torch.device, dtype: torch.dtype) -> None:
        if argument:
            raise ValueError(f"this reward takes no argument, got {argument!r}")
        try:
            import onnxruntime  # noqa: F401 - rapidocr imports it in the first call
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ValueError(f"reward ocr needs an extra; pip install 'stepfuse[ocr]' ({error})") from error
        options = {
            "Global.log_level": "critical",  # it warns of images without text
            "Global.use_cls": False,  # no search for text that is upside down, as in Flow-GRPO
            "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
        }
        self.recogniser = RapidOCR(params=options)

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        wanted = [quoted_texts(prompt) for prompt in prompts]
        scores = [legibility(self.read(pixels), texts) for pixels, texts in zip(images, wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def read(self, pixels: Float[Tensor, "3 height width"]) -> str:
        """Return the text of one image, its lines joined without white space between them."""
        return "".join(self.recogniser(to_image(pixels)).txts or ())


OCR = NamedReward(
    build=OCRReward,
    source="arXiv:2505.05470, with PP-OCRv6 of rapidocr",
    differentiable=False,
    unit="0 to 1",
    weights=31_000_000,
    package="rapidocr",
    extra="ocr",
)
