"""JSON over HTTP to a service that may be down for a while: retries, time-outs, a token; nothing executes code."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
_LONGEST = 64  # MB of an answer that are read


class Temporary(Exception):
    """A failure that another attempt may not meet."""


@dataclass(frozen=True)
class Endpoint:
    """Where a service listens and how patiently it is asked.

    A refused connection, a time-out, a 5xx status, 429, or an answer that is not the expected JSON is tried `retries`
    times more, after backoff_s, 2 backoff_s, 4 backoff_s, ... seconds. token_env names an environment variable whose
    value is sent as a bearer token. Redirects are not followed, so that the token reaches no other host.
    """

    url: str
    timeout_s: float
    retries: int
    backoff_s: float
    token_env: str | None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must be http://host:port/path or https://..., got {self.url!r}")
        if not self.timeout_s > 0 or self.retries < 0 or not self.backoff_s >= 0:
            raise ValueError(f"need timeout_s > 0, retries >= 0 and backoff_s >= 0, got {self.timeout_s}, "
                             f"{self.retries} and {self.backoff_s}")

    def ask(self, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """read(the JSON answer); `read` may raise Temporary to have the service asked again.

        Raises: ValueError if the service refuses or fails after all attempts, and what `read` raises.
        """
        headers = {"Content-Type": "application/json", **self._authorization()}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        for attempt in range(self.retries + 1):
            try:
                return read(_post(request, self.timeout_s))
            except Temporary as error:
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
    """The JSON answer."""
    try:
        with urllib.request.build_opener(_NoRedirect()).open(request, timeout=timeout_s) as response:
            text = response.read(_LONGEST * 1_000_000)
    except urllib.error.HTTPError as error:
        said = error.read(300).decode(errors="replace").strip()
        if error.code >= 500 or error.code == 429:
            raise Temporary(f"status {error.code} {said}") from None
        raise ValueError(f"the reward service {request.full_url} answered with status {error.code} {said}; check "
                         "reward.url and the token in reward.token_env") from None
    except (OSError, http.client.HTTPException) as error:  # refused, unreachable, timed out, cut short
        raise Temporary(f"{type(error).__name__}: {error}") from None
    try:
        return json.loads(text)
    except ValueError:
        raise Temporary(f"an answer that is not JSON: {text[:80]!r}") from None


def png(picture: Any) -> str:
    """A PIL picture as a PNG file in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
