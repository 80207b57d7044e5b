"""A reward service over HTTP: JSON with PNG images in base64, nothing that executes code on either side."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from jaxtyping import Float
from torch import Tensor

from diffalign.spec import spec
from diffalign_image.rewards.protocol import Metadata, checked, to_pictures

_LONGEST = 64  # MB of an answer that are read


class _Temporary(Exception):
    """A failure that another attempt may not meet."""


@spec
class Remote:
    """A reward service: POST {"images": [base64 PNG], "prompts": [...], "metadata": [...]} -> {"rewards": [...]}.

    A refused connection, a time-out, a 5xx status, 429, or an answer that is not such JSON is tried `retries` times
    more, after backoff_s, 2 backoff_s, 4 backoff_s, ... seconds. token_env names an environment variable whose value is
    sent as a bearer token. Redirects are not followed, so that the token reaches no other host.
    """

    type: Literal["remote"] = "remote"
    url: str
    timeout_s: float = 60.0
    retries: int = 4
    backoff_s: float = 1.0
    token_env: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must be http://host:port/path or https://..., got {self.url!r}")
        if not self.timeout_s > 0 or self.retries < 0 or not self.backoff_s >= 0:
            raise ValueError(f"need timeout_s > 0, retries >= 0 and backoff_s >= 0, got {self.timeout_s}, "
                             f"{self.retries} and {self.backoff_s}")

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """The service's rewards.

        Raises: ValueError if it refuses, fails after all attempts, or answers with anything but N finite numbers.
        """
        body = json.dumps({"images": [_png(picture) for picture in to_pictures(images)], "prompts": list(captions),
                           "metadata": [dict(one) for one in metadata] or [{} for _ in captions]}).encode()
        headers = {"Content-Type": "application/json", **self._authorization()}
        for attempt in range(self.retries + 1):
            try:
                answer = _post(urllib.request.Request(self.url, body, headers, method="POST"), self.timeout_s)
                return checked(answer, len(captions), f"the reward service {self.url}")
            except _Temporary as error:
                if attempt == self.retries:
                    raise ValueError(f"the reward service {self.url} failed {attempt + 1} times, last with: {error}. "
                                     "The last checkpoint is kept: start the service again and go on with --resume"
                                     ) from None
                time.sleep(self.backoff_s * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _authorization(self) -> dict[str, str]:
        if self.token_env is None:
            return {}
        token = os.environ.get(self.token_env)
        if not token:
            raise ValueError(f"reward.token_env: the environment variable {self.token_env} is not set; export the "
                             "reward service's token in it")
        return {"Authorization": f"Bearer {token}"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


def _post(request: urllib.request.Request, timeout_s: float) -> Any:
    """The `rewards` of a JSON answer."""
    try:
        with urllib.request.build_opener(_NoRedirect()).open(request, timeout=timeout_s) as response:
            text = response.read(_LONGEST * 1_000_000)
    except urllib.error.HTTPError as error:
        said = error.read(300).decode(errors="replace").strip()
        if error.code >= 500 or error.code == 429:
            raise _Temporary(f"status {error.code} {said}") from None
        raise ValueError(f"the reward service {request.full_url} answered with status {error.code} {said}; check "
                         "reward.url and the token in reward.token_env") from None
    except (OSError, http.client.HTTPException) as error:  # refused, unreachable, timed out, cut short
        raise _Temporary(f"{type(error).__name__}: {error}") from None
    try:
        answer = json.loads(text)
    except ValueError:
        raise _Temporary(f"an answer that is not JSON: {text[:80]!r}") from None
    if not isinstance(answer, dict) or "rewards" not in answer:
        raise _Temporary(f'an answer without "rewards": {str(answer)[:80]}')
    return answer["rewards"]


def _png(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
