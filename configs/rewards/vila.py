"""VILA's published image model as a worker, for vila.yaml.

This file is imported only in the worker's environment, which has TensorFlow and neither stepfuse nor torch.
"""

import io


class VILA:
    """A SavedModel whose signature takes the bytes of one PNG file and returns a score in [0, 1].

    Args:
        model: URL of TensorFlow Hub, or folder of a downloaded model.
    """

    def __init__(self, model: str = "https://tfhub.dev/google/vila/image/1") -> None:
        import tensorflow_hub

        self.loaded = tensorflow_hub.load(model)  # kept, because its signatures become invalid when it is deleted
        self.predict = self.loaded.signatures["serving_default"]

    def __call__(self, images, prompts):
        """Return one score per uint8 array (height, width, 3). Prompts are not used."""
        import tensorflow
        from PIL import Image

        scores = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            scores.append(float(self.predict(tensorflow.constant(file.getvalue()))["predictions"].numpy().reshape(())))
        return scores
