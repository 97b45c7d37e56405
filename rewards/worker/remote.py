"""The client side of rewards that are computed in another process or on another machine."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stepfuse.data.images import to_bytes
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.worker.messages import batch_slices, encode


class RequestError(Exception):
    """A request failed in a manner that may not occur again, such as a broken connection."""


class RemoteReward(ABC):
    """A reward that sends 8-bit images and prompts, batch by batch, and receives scores. It is not differentiable.

    If a request fails, the complete batch is sent once more, so that no score is lost, duplicated, or assigned to
    another image. An exception of the reward, and a response of another shape or to another request, are not retried.

    Attributes:
        label: Name in error messages, such as `worker 'mine'`.
        batch_size: Maximum number of images per request.
    """

    label: str
    batch_size: int
    _requests = 0

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        arrays, scores = to_bytes(images), [np.zeros(0)]
        for part in batch_slices(arrays, self.batch_size):
            where = f"images {part.start} to {part.stop - 1} of the batch"
            scores.append(self._score_batch(arrays[part], list(prompts[part]), where))
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

    def _score_batch(self, arrays: np.ndarray, prompts: list[str], where: str) -> np.ndarray:
        self._requests += 1
        header = {"kind": "score", "id": self._requests, "prompts": prompts}
        for attempt in range(2):
            try:
                answer, scores = self.exchange(encode(header, [arrays]))
                break
            except RequestError as error:
                hint = self.recover()
                if attempt:
                    raise ValueError(f"{self.label} failed twice on {where}: it {error}; {hint}") from error
        kind, answered = answer.get("kind"), answer.get("id", self._requests) == self._requests
        if answered and kind == "out of memory":  # on this machine, whose memory is shared
            raise MemoryError(f"{self.label}: {answer.get('message')}")
        if answered and kind == "failed":
            raise ValueError(str(answer.get("message")))
        shapes = [array.shape for array in scores]
        if not answered or kind != "scores" or shapes != [(len(arrays),)]:
            self.recover()  # the next response on this connection may be wrong too
            raise ValueError(
                f"{self.label} sent an invalid response on {where}: {str(answer)[:200]} with arrays of "
                f"shapes {shapes}; expected the scores of request {self._requests}, an array of shape {(len(arrays),)}"
            )
        return scores[0]
