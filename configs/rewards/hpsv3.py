"""The hpsv3 package as a worker, for hpsv3.yaml.

This file is imported only in the worker's environment, which has an older version of transformers and no stepfuse. It
was run with hpsv3 1.0.0 and random weights on the CPU, not with the published weights.
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


class HPSv3:
    """The mean μ of the Gaussian N(μ, σ²) that the package predicts for an image's score, as published.

    Args:
        config: Path of a configuration in the package's format; by default its HPSv3_7B.yaml.
        checkpoint: Path of a checkpoint; by default MizzenAI/HPSv3 is downloaded.
        device: Device of the model.
    """

    def __init__(self, config: str | None = None, checkpoint: str | None = None, device: str = "cuda") -> None:
        define_operators()
        from hpsv3 import HPSv3RewardInferencer

        self.inferencer = HPSv3RewardInferencer(config_path=config, checkpoint_path=checkpoint, device=device)

    def __call__(self, images, prompts):
        """Return one score per uint8 array (height, width, 3) and prompt."""
        from PIL import Image

        pictures = [Image.fromarray(image) for image in images]
        with torch.inference_mode():
            # By name: the order of the two changed after version 1.0.0. Images are given as such instead of as paths.
            outputs = self.inferencer.reward(image_paths=pictures, prompts=list(prompts))
        return outputs[:, 0].float().tolist()  # μ; the second column is that of σ
