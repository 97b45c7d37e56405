"""The image-reward package as a worker, for image_reward_original.yaml.

This file is imported only in the worker's environment, which has an older version of transformers and no stepfuse.
"""

import torch

DEFINED: list = []  # keeps the library, whose definitions are removed when it is deleted


def define_operators() -> None:
    """Define operators that torchvision's CUDA build cannot load with a CPU build of torch. They are not called."""
    if DEFINED or torch.cuda.is_available():
        return
    DEFINED.append(torch.library.Library("torchvision", "DEF"))
    for name in ("nms", "qnms"):
        DEFINED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class ImageRewardOriginal:
    """`ImageReward.load` and the method `score` of the package, one image at a time as published.

    Args:
        name: Name of a published model, or path of a checkpoint in its layout.
        med_config: Path of med_config.json; by default it is downloaded.
        vocabulary: Folder with the tokenizer's vocab.txt; by default bert-base-uncased is downloaded.
        device: Device of the model.
    """

    def __init__(
        self,
        name: str = "ImageReward-v1.0",
        med_config: str | None = None,
        vocabulary: str | None = None,
        device: str = "cpu",
    ) -> None:
        define_operators()
        import ImageReward
        from ImageReward.models.BLIP import blip

        if vocabulary is not None:
            published = blip.BertTokenizer.from_pretrained
            blip.BertTokenizer.from_pretrained = lambda name: published(vocabulary)
        self.model = ImageReward.load(name, device=device, med_config=med_config)

    def __call__(self, images, prompts):
        """Return one score per uint8 array (height, width, 3) and prompt."""
        from PIL import Image

        with torch.no_grad():
            return [
                self.model.score(prompt, Image.fromarray(image)) for image, prompt in zip(images, prompts, strict=True)
            ]
