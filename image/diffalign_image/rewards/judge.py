"""A vision-language model as the judge, over the chat API that OpenAI, vLLM, SGLang, llama.cpp and Ollama serve."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from diffalign.spec import spec
from diffalign_image.rewards.http import Endpoint, Temporary, png
from diffalign_image.rewards.protocol import Metadata, checked, to_pictures

_FORMAT = ' Answer with JSON only: {{"score": a number from {low:g} to {high:g}}}.'


@spec
class Judge:
    """A vision-language model that scores each image for its prompt; the score is moved from [low, high] to [0, 1].

    url: the full address, .../v1/chat/completions. question: what is asked, `{prompt}` stands for the prompt; the form
    of the answer is added. temperature 0 asks for the same score each time. parallel: requests at a time. An answer
    that holds no such score is asked again, like any failure (see `Endpoint` for retries and the token).
    """

    type: Literal["judge"] = "judge"
    url: str
    model: str
    question: str = 'How well does this image show "{prompt}", and how good does it look?'
    low: float = 0.0
    high: float = 10.0
    temperature: float = 0.0
    max_tokens: int = 200
    parallel: int = 4
    timeout_s: float = 120.0
    retries: int = 4
    backoff_s: float = 1.0
    token_env: str | None = None

    def __post_init__(self) -> None:
        self._endpoint()
        if not self.low < self.high or self.parallel < 1 or self.max_tokens < 1:
            raise ValueError(f"need low < high, parallel >= 1 and max_tokens >= 1, got {self.low}, {self.high}, "
                             f"{self.parallel} and {self.max_tokens}")

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """Scores in [0, 1]. Raises: ValueError if the service refuses, or fails after all attempts."""
        with ThreadPoolExecutor(self.parallel) as pool:
            scores = list(pool.map(self._score, map(png, to_pictures(images)), captions))
        return checked([(score - self.low) / (self.high - self.low) for score in scores], len(captions), "the judge")

    def _score(self, image: str, caption: str) -> float:
        text = self.question.replace("{prompt}", caption) + _FORMAT.format(low=self.low, high=self.high)
        content = [{"type": "text", "text": text},
                   {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}],
                "temperature": self.temperature, "max_tokens": self.max_tokens}
        return self._endpoint().ask(body, lambda answer: read_score(said(answer), self.low, self.high))

    def _endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.timeout_s, self.retries, self.backoff_s, self.token_env)


def said(answer: Any) -> str:
    """The text of a chat answer. Raises: Temporary if it is no such answer."""
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise Temporary(f"an answer without choices[0].message.content: {str(answer)[:80]}") from None
    if not isinstance(text, str):
        raise Temporary(f"an answer whose content is no text: {str(answer)[:80]}")
    return text


def read_score(text: str, low: float, high: float) -> float:
    """The number of the last {"score": number} in a text. Raises: Temporary if there is none in [low, high]."""
    for found in reversed(re.findall(r"\{[^{}]*\}", text)):
        try:
            score = json.loads(found).get("score")
        except ValueError:
            continue
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if number and math.isfinite(score) and low <= score <= high:
            return float(score)
    raise Temporary(f'an answer without {{"score": number from {low:g} to {high:g}}}: {text[:80]!r}')
