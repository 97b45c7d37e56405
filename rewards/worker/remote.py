"""The client side of rewards that are computed in another process or on another machine."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from stepfuse.rewards.pixels import to_bytes
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.worker.messages import batch_slices, encode


class RequestError(Exception):
    """A request failed in a manner that may not occur again, such as a broken connection."""


class RemoteReward(ABC):
    """A reward that sends 8-bit images and prompts, batch by batch, and receives scores. It is not differentiable.

    If a request fails, the complete batch is sent once more, so that no score is lost, duplicated, or assigned to
    another image. An exception of the reward itself is not retried.

    Attributes:
        label: Name in error messages, such as `worker 'mine'`.
        batch_size: Maximum number of images per request.
        requires_id: Whether a response must repeat the id of its request, as where responses share one connection.
    """

    label: str
    batch_size: int
    requires_id: ClassVar[bool] = True
    _requests = 0

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        arrays, scores = to_bytes(images), [np.zeros(0)]
        for part in batch_slices(arrays, self.batch_size):
            scores.append(self._score_batch(arrays[part], list(prompts[part]), part.start))
        return torch.from_numpy(np.concatenate(scores)).float().to(images.device)

    @abstractmethod
    def exchange(self, message: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Send an encoded request and return the header and the arrays of the response.

        Raises:
            RequestError: If it failed and can be repeated.
            ValueError: If repeating it is useless.
        """

    @abstractmethod
    def recover(self) -> str:
        """Prepare for another request after a failed one, and return a hint for the error message."""

    def _score_batch(self, arrays: np.ndarray, prompts: list[str], first: int) -> np.ndarray:
        problem = hint = ""
        for _ in range(2):
            self._requests += 1
            header = {"kind": "score", "id": self._requests, "prompts": prompts}
            try:
                answer, scores = self.exchange(encode(header, [arrays]))
                shapes = [array.shape for array in scores]
                if answer.get("id", None if self.requires_id else header["id"]) == header["id"]:
                    if answer.get("kind") == "failed":
                        raise ValueError(str(answer.get("message")))
                    if answer.get("kind") == "scores" and shapes == [(len(arrays),)]:
                        return scores[0]
                raise RequestError(f"sent an invalid response ({str(answer)[:200]} with arrays of shapes {shapes})")
            except RequestError as error:
                problem, hint = str(error), self.recover()
        last = first + len(arrays) - 1
        raise ValueError(f"{self.label} failed twice on images {first} to {last} of the batch: it {problem}; {hint}")
