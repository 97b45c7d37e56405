"""The image-reward package itself, for an environment of its own: `worker:` in image_reward_original.yaml names this.

It runs beside old transformers in a process without stepfuse; only that process imports it.
"""

import torch

DEFINED: list = []  # a library that is forgotten takes its definitions along


def define_operators() -> None:
    """torchvision's build for CUDA cannot load its operators beside a torch for CPUs; nothing here calls them."""
    if DEFINED or torch.cuda.is_available():
        return
    DEFINED.append(torch.library.Library("torchvision", "DEF"))
    for name in ("nms", "qnms"):
        DEFINED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class ImageRewardOriginal:
    """`ImageReward.load` and its `score`, one image at a time as published.

    Args:
        name: of a published model, or the path of a checkpoint in its layout.
        med_config: the path of med_config.json; by default it is downloaded.
        vocabulary: a folder with vocab.txt for its tokenizer; by default bert-base-uncased is downloaded.
        device: where it runs.
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
        """Uint8 arrays (height, width, 3) and their prompts → one number each."""
        from PIL import Image

        with torch.no_grad():
            return [
                self.model.score(prompt, Image.fromarray(image)) for image, prompt in zip(images, prompts, strict=True)
            ]
