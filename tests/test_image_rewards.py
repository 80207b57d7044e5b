"""Rewards that reach out of the process or need weights: a user's function, CLIP models, a service over HTTP."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines import clip_config, clip_tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from diffalign_image.rewards import (
    Aesthetic,
    ClipScore,
    Jpeg,
    JpegIncompressibility,
    PickScore,
    PythonFunction,
    Remote,
    Term,
    WeightedSum,
)
from diffalign_image.rewards.protocol import checked

CAPTIONS = ["a red cat", "dark blue sky", "a dog"]
SIDE = 12


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


# A function of the user's


def write(folder: Path, name: str, body: str) -> str:
    file = folder / f"{name}.py"
    file.write_text(f"import torch\ndef score(images, prompts, metadata):\n    {body}\n")
    return f"{file}:score"


def test_a_python_function_gets_images_prompts_and_metadata(tmp_path: Path, images: torch.Tensor) -> None:
    body = ("assert prompts == ['a red cat', 'dark blue sky', 'a dog'] and images.dtype == torch.{0}\n"
            "    return images.float().mean((1, 2, 3)) + torch.tensor([one.get('bonus', 0) for one in metadata])")
    metadata = [{"bonus": 1}, {}, {"bonus": 3}]
    extra = torch.tensor([1.0, 0.0, 3.0])
    whole = PythonFunction(function=write(tmp_path, "whole", body.format("float32")), images="float")
    torch.testing.assert_close(whole(images, CAPTIONS, metadata), images.mean((1, 2, 3)) + extra)
    torch.testing.assert_close(whole(images, CAPTIONS), images.mean((1, 2, 3)))
    bytes_ = PythonFunction(function=write(tmp_path, "bytes", body.format("uint8")))
    found = bytes_(images, CAPTIONS, metadata) - extra
    torch.testing.assert_close(found / 127.5 - 1, images.mean((1, 2, 3)), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("body", "message"), [
    ("return images.float().mean()", r"shape \(3,\), got \(\)"),
    ("return [1.0, 2.0]", r"shape \(3,\), got \(2,\)"),
    ("return torch.ones(3, 1)", r"shape \(3,\), got \(3, 1\)"),
    ("return [1.0, float('nan'), float('inf')]", r"returned nan for image 1 \(2 of 3 are not finite\)"),
    ("return ['good', 'bad', 'bad']", "no list of numbers"),
    ("return None", "got NoneType that is no list of numbers"),
])
def test_a_python_function_that_returns_something_else(tmp_path: Path, images: torch.Tensor, body: str, message: str
                                                       ) -> None:
    with pytest.raises(ValueError, match=message):
        PythonFunction(function=write(tmp_path, "wrong", body))(images, CAPTIONS)


def test_a_python_function_that_is_not_there(tmp_path: Path, images: torch.Tensor) -> None:
    for wrong in ("score", "rewards.py", "a/rewards.txt:score", "rewards.py:not a name"):
        with pytest.raises(ValueError, match=r"function must be FILE\.py:NAME"):
            PythonFunction(function=wrong)
    with pytest.raises(ValueError, match="does not exist"):
        PythonFunction(function=f"{tmp_path}/none.py:score")(images, CAPTIONS)
    file = write(tmp_path, "there", "return []").removesuffix(":score")
    with pytest.raises(ValueError, match="has no function 'missing'; it has score"):
        PythonFunction(function=f"{file}:missing")(images, CAPTIONS)


def test_checked_rewards_carry_no_gradient_and_are_float32() -> None:
    found = checked(torch.ones(2, dtype=torch.float64, requires_grad=True), 2, "it")
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_incompressibility_is_minus_compressibility_of_any_size() -> None:
    flat, noisy = torch.zeros(1, 3, 24, 40), torch.rand(1, 3, 24, 40) * 2 - 1
    both = torch.cat([flat, noisy])
    size = JpegIncompressibility()(both, ["", ""])
    assert size[1] > 2 * size[0] > 0
    torch.testing.assert_close(size, -Jpeg()(both, ["", ""]))
    for kind in (Jpeg, JpegIncompressibility):
        with pytest.raises(ValueError, match=r"quality must lie in 1\.\.95"):
            kind(quality=100)


# CLIP


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                              image_size=8, patch_size=4, projection_dim=12)
    text = clip_config(16, 12)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
              ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return folder


def by_hand(clip: Path, images: torch.Tensor) -> tuple[CLIPModel, torch.Tensor, torch.Tensor]:
    """The model and its own embeddings, from its own forward call."""
    model, processor = CLIPModel.from_pretrained(clip), CLIPImageProcessor.from_pretrained(clip)
    pictures = [Image.fromarray(((one + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()) for one in images]
    tokens = clip_tokenizer()(CAPTIONS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=processor(images=pictures, return_tensors="pt")["pixel_values"], **tokens)
    return model, out.image_embeds, out.text_embeds


def test_clip_score_and_pick_score_are_the_models_own_logits(clip: Path, images: torch.Tensor) -> None:
    model, image, text = by_hand(clip, images)
    cosine = (image * text).sum(1) / (image.norm(dim=1) * text.norm(dim=1))
    torch.testing.assert_close(ClipScore(model=str(clip))(images, CAPTIONS), 2.5 * cosine.clamp(min=0))
    assert ClipScore(model=str(clip))(images, CAPTIONS).max() > 0
    found = PickScore(model=str(clip), processor=str(clip))(images, CAPTIONS)
    torch.testing.assert_close(found, float(model.logit_scale.detach().exp()) * cosine)
    assert found.unique().numel() == 3


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_aesthetic_head_is_a_chain_on_unit_features(clip: Path, tmp_path: Path, images: torch.Tensor, suffix: str
                                                        ) -> None:
    layers = {0: torch.nn.Linear(12, 6), 2: torch.nn.Linear(6, 4), 10: torch.nn.Linear(4, 1)}
    stored = {f"layers.{i}.{kind}": getattr(layer, kind).detach() for i, layer in layers.items()
              for kind in ("weight", "bias")}
    head = tmp_path / f"head{suffix}"
    (torch.save if suffix == ".pth" else save_file)(stored, head)
    _, image, _ = by_hand(clip, images)
    with torch.no_grad():
        expected = torch.nn.Sequential(*layers.values())(image / image.norm(dim=1, keepdim=True))[:, 0]
    torch.testing.assert_close(Aesthetic(model=str(clip), head=str(head))(images, CAPTIONS), expected)


def test_missing_weights_say_what_to_download(clip: Path, tmp_path: Path, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"hf download openai/clip-vit-large-patch14 --local-dir models/clip"):
        ClipScore()(images, CAPTIONS)
    with pytest.raises(ValueError, match=r"PickScore_v1` and `hf download laion/CLIP-ViT-H-14.*reward\.processor"):
        PickScore()(images, CAPTIONS)
    with pytest.raises(ValueError, match=r"reward\.head: none\.pth does not exist; download sac\+logos"):
        Aesthetic(model=str(clip), head="none.pth")(images, CAPTIONS)
    torch.save({"layers.0.weight": torch.ones(1, 7), "layers.0.bias": torch.ones(1)}, tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match=r"expected a chain from 12 numbers"):
        Aesthetic(model=str(clip), head=str(tmp_path / "narrow.pth"))(images, CAPTIONS)
    torch.save({"layers.0.weight": torch.ones(1, 12)}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match=r"lacks 'layers\.0\.bias'"):
        Aesthetic(model=str(clip), head=str(tmp_path / "half.pth"))(images, CAPTIONS)


# A service


class Service:
    """A real HTTP server; `answers` are what it says in turn, the last one for ever."""

    def __init__(self, answers: list[Callable[[BaseHTTPRequestHandler, dict], None]]) -> None:
        self.answers, self.seen = answers, []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.seen.append({"headers": dict(self.headers), "body": body, "at": time.monotonic()})
                answer = service.answers[min(len(service.seen), len(service.answers)) - 1]
                answer(self, body)

            do_GET = do_POST

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def reply(handler: BaseHTTPRequestHandler, text: str, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(text)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(text.encode())


def brightness(handler: BaseHTTPRequestHandler, body: dict) -> None:
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in body["images"]]
    reply(handler, json.dumps({"rewards": [float(picture.mean()) for picture in pictures]}))


def says(text: str, status: int = 200, **headers: str) -> Callable[[BaseHTTPRequestHandler, dict], None]:
    return lambda handler, body: reply(handler, text, status, **headers)


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def begin(*answers: Callable[[BaseHTTPRequestHandler, dict], None]) -> Service:
        services.append(Service(list(answers)))
        return services[-1]

    yield begin
    for service in services:
        service.close()


def remote(url: str, **changes) -> Remote:
    return Remote(**{"url": url, "timeout_s": 5.0, "retries": 2, "backoff_s": 0.05, **changes})


def test_a_service_scores_png_images(serve, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    service = serve(brightness)
    monkeypatch.setenv("SCORER_TOKEN", "secret")
    found = remote(service.url, token_env="SCORER_TOKEN")(images, CAPTIONS, [{"count": 2}, {}, {}])
    torch.testing.assert_close(found / 127.5 - 1, images.mean((1, 2, 3)), atol=1e-3, rtol=0)
    request = service.seen[0]
    assert request["body"]["prompts"] == CAPTIONS
    assert request["body"]["metadata"] == [{"count": 2}, {}, {}]
    assert request["headers"]["Authorization"] == "Bearer secret"
    remote(service.url)(images, CAPTIONS)
    assert "Authorization" not in service.seen[1]["headers"]
    assert service.seen[1]["body"]["metadata"] == [{}, {}, {}]


@pytest.mark.parametrize("bad", [says("busy", 503), says("later", 429), says("<html>"), says('{"score": 1}'),
                                 says("[]")])
def test_a_failing_service_is_asked_again_with_growing_pauses(serve, images: torch.Tensor, bad) -> None:
    service = serve(bad, bad, brightness)
    assert remote(service.url)(images, CAPTIONS).shape == (3,)
    first, second, third = (request["at"] for request in service.seen)
    assert second - first >= 0.05
    assert third - second >= 0.1


def test_a_service_that_stays_broken_stops_the_run(serve, images: torch.Tensor) -> None:
    service = serve(says("broken", 500))
    with pytest.raises(ValueError, match=r"failed 3 times, last with: status 500 broken.*--resume"):
        remote(service.url)(images, CAPTIONS)
    assert len(service.seen) == 3
    service.close()
    with pytest.raises(ValueError, match="failed 1 times"):
        remote(service.url, retries=0)(images, CAPTIONS)


def test_a_hanging_service_times_out(serve, images: torch.Tensor) -> None:
    service = serve(lambda handler, body: time.sleep(0.6))
    begun = time.monotonic()
    with pytest.raises(ValueError, match="failed 2 times"):
        remote(service.url, timeout_s=0.2, retries=1)(images, CAPTIONS)
    assert 0.4 <= time.monotonic() - begun < 3


def test_refused_requests_and_wrong_rewards_are_not_repeated(serve, images: torch.Tensor) -> None:
    for answer, message in ((says("no", 401), "status 401 no; check"), (says('{"rewards": [1, 2]}'), r"got \(2,\)"),
                            (says('{"rewards": [1, NaN, 2]}'), "returned nan for image 1"),
                            (says('{"rewards": "good"}'), "no list of numbers")):
        service = serve(answer)
        with pytest.raises(ValueError, match=message):
            remote(service.url)(images, CAPTIONS)
        assert len(service.seen) == 1


def test_the_token_does_not_follow_a_redirect(serve, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_TOKEN", "secret")
    other = serve(brightness)
    service = serve(says("", 302, Location=other.url))
    with pytest.raises(ValueError, match="status 302"):
        remote(service.url, token_env="SCORER_TOKEN")(images, CAPTIONS)
    assert not other.seen


def test_settings_of_a_service_are_checked(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("file:///etc/passwd", "localhost:80", "http://"):
        with pytest.raises(ValueError, match="url must be http"):
            Remote(url=url)
    for wrong in ({"timeout_s": 0}, {"retries": -1}, {"backoff_s": -1}):
        with pytest.raises(ValueError, match="need timeout_s > 0"):
            Remote(url="http://localhost/", **wrong)
    monkeypatch.delenv("SCORER_TOKEN", raising=False)
    with pytest.raises(ValueError, match="environment variable SCORER_TOKEN is not set"):
        remote("http://127.0.0.1:9/", token_env="SCORER_TOKEN")(images, CAPTIONS)


def test_a_weighted_sum_passes_the_metadata_on(tmp_path: Path, images: torch.Tensor) -> None:
    mine = PythonFunction(function=write(tmp_path, "meta", "return [one['bonus'] for one in metadata]"))
    total = WeightedSum(terms=(Term(weight=2.0, reward=mine), Term(weight=0.5, reward=Jpeg())))
    found = total(images, CAPTIONS, [{"bonus": 1}, {"bonus": 2}, {"bonus": 3}])
    torch.testing.assert_close(found, torch.tensor([2.0, 4.0, 6.0]) + 0.5 * Jpeg()(images, CAPTIONS))
