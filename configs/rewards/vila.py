"""VILA's published image model, for an environment of its own: `worker:` in vila.yaml names this.

It runs beside TensorFlow in a process without stepfuse and without torch.
"""

import io


class VILA:
    """Its signature takes the bytes of one PNG and gives one number in [0, 1].

    Args:
        model: of TensorFlow Hub, or a folder it was downloaded to.
    """

    def __init__(self, model: str = "https://tfhub.dev/google/vila/image/1") -> None:
        import tensorflow_hub

        self.loaded = tensorflow_hub.load(model)  # its signatures live as long as it does
        self.predict = self.loaded.signatures["serving_default"]

    def __call__(self, images, prompts):
        """Uint8 arrays (height, width, 3) → one number each; prompts do not count."""
        import tensorflow
        from PIL import Image

        scores = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            scores.append(float(self.predict(tensorflow.constant(file.getvalue()))["predictions"].numpy().reshape(())))
        return scores
