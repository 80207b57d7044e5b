"""A reward service over HTTP: JSON with PNG images in base64, nothing that executes code on either side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from diffalign.spec import spec
from diffalign_image.rewards.http import Endpoint, Temporary, png
from diffalign_image.rewards.protocol import Metadata, checked, to_pictures


@spec
class Remote:
    """A reward service: POST {"images": [base64 PNG], "prompts": [...], "metadata": [...]} -> {"rewards": [...]}.

    timeout_s, retries, backoff_s, token_env: see `Endpoint`.
    """

    type: Literal["remote"] = "remote"
    url: str
    timeout_s: float = 60.0
    retries: int = 4
    backoff_s: float = 1.0
    token_env: str | None = None

    def __post_init__(self) -> None:
        self._endpoint()

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """The service's rewards.

        Raises: ValueError if it refuses, fails after all attempts, or answers with anything but N finite numbers.
        """
        body = {"images": [png(picture) for picture in to_pictures(images)], "prompts": list(captions),
                "metadata": [dict(one) for one in metadata] or [{} for _ in captions]}
        return self._endpoint().ask(
            body, lambda answer: checked(_rewards(answer), len(captions), f"the reward service {self.url}"))

    def _endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.timeout_s, self.retries, self.backoff_s, self.token_env)


def _rewards(answer: Any) -> Any:
    if not isinstance(answer, dict) or "rewards" not in answer:
        raise Temporary(f'an answer without "rewards": {str(answer)[:80]}')
    return answer["rewards"]
