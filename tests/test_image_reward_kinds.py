"""Rewards by OCR, by a detector, by a judge and by preference models, and several made one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import BertTokenizerFast, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from diffalign import config
from diffalign_image.rewards import (
    HPS,
    Constrained,
    Constraint,
    GenEval,
    ImageReward,
    Jpeg,
    JpegIncompressibility,
    Judge,
    NormalizedSum,
    Ocr,
    PerReward,
    Product,
    PythonFunction,
    Term,
    TrainingReward,
    WeightedSum,
    named_rewards,
    overall,
)
from diffalign_image.rewards.geneval import Found, color_name, color_of, relations, requirements
from diffalign_image.rewards.http import Temporary
from diffalign_image.rewards.image_reward import load_blip
from diffalign_image.rewards.judge import read_score
from diffalign_image.rewards.ocr import edit_distance, text_score, wanted_text

IMAGES = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
CAPTIONS = ["a red cat", "dark blue sky", "a dog"]


def write(folder: Path, name: str, body: str) -> str:
    (folder / f"{name}.py").write_text(body)
    return f"{folder / name}.py:{name}"


# Text


@pytest.mark.parametrize(("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3),
                                                  ("flaw", "lawn", 2), ("same", "same", 0), ("ab", "ba", 2)])
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_text_scores() -> None:
    assert text_score("say HELLO world now", "Hello World") == 1
    assert text_score("Hallo World", "Hello World") == pytest.approx(1 - 1 / 10)  # one letter of ten
    assert text_score("", "abc") == 0
    assert text_score("x" * 50, "abc") == 0  # never negative


def test_the_wanted_text_is_quoted_or_in_the_metadata() -> None:
    assert wanted_text('a sign "Open now" and "Free"', {}) == "Open now Free"
    assert wanted_text('a sign "Open"', {"text": "Closed"}) == "Closed"
    for metadata in ({}, {"text": " "}, {"text": 3}):
        with pytest.raises(ValueError, match="needs the wanted text"):
            wanted_text("a sign", metadata)


def test_ocr_asks_any_engine(tmp_path: Path) -> None:
    engine = write(tmp_path, "engine", "def engine(images):\n"
                   "    assert images.shape == (3, 12, 12, 3) and str(images.dtype) == 'uint8'\n"
                   "    return ['cat', 'dig', '']\n")
    found = Ocr(engine=engine)(IMAGES, ["x", 'a "dog"', "z"], [{"text": "Cat"}, {}, {"text": "ox"}])
    assert found.tolist() == pytest.approx([1, 2 / 3, 0])
    for body in ("return ['a']", "return [1, 2, 3]"):
        wrong = write(tmp_path, f"wrong{len(body)}", f"def wrong{len(body)}(images):\n    {body}\n")
        with pytest.raises(ValueError, match="must return one text an image, 3, got"):
            Ocr(engine=wrong)(IMAGES, ['"a"'] * 3)
    with pytest.raises(ValueError, match=r"engine must be FILE\.py:NAME or MODULE:NAME"):
        Ocr(engine="paddle")


def test_rapidocr_reads_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    sign = Image.new("RGB", (224, 80), "white")
    ImageDraw.Draw(sign).text((16, 18), "Hello World", fill=(200, 0, 0), font_size=32)
    image = torch.from_numpy(np.asarray(sign).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    try:
        import rapidocr  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"pip install rapidocr`, or set reward\.engine"):
            Ocr()(image, ['a sign "Hello World"'])
        return
    assert Ocr()(image, ['a sign "Hello World"']).tolist() == [1.0]
    assert Ocr()(image, ['a sign "Zebra"']).item() < 0.5


# Objects

RED, BLUE = (200, 20, 20), (20, 20, 200)


def scene() -> np.ndarray:
    """A red square left of a blue one on white, 40 x 20 pixels."""
    image = np.full((20, 40, 3), 255, np.uint8)
    image[5:15, 4:14], image[5:15, 26:36] = RED, BLUE
    return image


LEFT, RIGHT = (4.0, 5.0, 14.0, 15.0), (26.0, 5.0, 36.0, 15.0)


def test_relations_of_boxes() -> None:
    assert relations(LEFT, RIGHT) == {"left of"}
    assert relations(RIGHT, LEFT) == {"right of"}
    assert relations((0, 0, 2, 2), (0, 10, 2, 12)) == {"above"}
    assert relations((0, 10, 2, 12), (0, 0, 2, 2)) == {"below"}
    assert relations((0, 0, 2, 2), (10, 10, 12, 12)) == {"left of", "above"}
    assert relations(LEFT, LEFT) == set()
    # centers 2 apart, sizes 10 + 10: 0.1 * 20 of slack is all of the offset
    assert relations((0, 0, 10, 10), (2, 0, 12, 10)) == set()
    assert relations((0, 0, 10, 10), (4.5, 0, 14.5, 10)) == {"left of"}  # (4.5 - 2) / 4.5 > 0.5
    assert relations((0, 0, 10, 10), (3.5, 0, 13.5, 10)) == set()  # (3.5 - 2) / 3.5 < 0.5


def test_colors() -> None:
    named = {"red": RED, "blue": BLUE, "green": (30, 160, 40), "yellow": (240, 220, 30), "orange": (250, 140, 20),
             "purple": (130, 40, 170), "pink": (255, 170, 190), "brown": (120, 70, 30), "black": (15, 15, 15),
             "white": (250, 250, 250), "gray": (128, 128, 128)}
    assert {name: color_name(*rgb) for name, rgb in named.items()} == {name: name for name in named}
    assert color_of(scene(), LEFT) == "red"
    assert color_of(scene(), (16, 0, 24, 20)) == "white"
    with pytest.raises(ValueError, match="outside of the image of 40 x 20 pixels"):
        color_of(scene(), (100, 5, 120, 15))


def test_requirements_of_a_prompt() -> None:
    objects = [Found(LEFT, "box"), Found(RIGHT, "box", 0.8), Found(RIGHT, "ball", 0.9, "green")]

    def met(include: list, exclude: list = ()) -> list[bool]:
        return requirements(scene(), objects, {"include": include, "exclude": exclude})

    assert met([{"class": "box", "count": 2}]) == [True]
    assert met([{"class": "box", "count": 3}]) == [False]
    assert met([{"class": "box", "color": "red"}]) == [True, True]  # the most certain box
    assert met([{"class": "box", "count": 2, "color": "red"}]) == [True, False]
    assert met([{"class": "ball", "color": "green"}]) == [True, True]  # the detector said so
    assert met([{"class": "box"}, {"class": "ball", "position": ["right of", 0]}]) == [True, True, True]
    assert met([{"class": "box"}, {"class": "ball", "position": ["left of", 0]}]) == [True, True, False]
    assert met([{"class": "cat"}, {"class": "ball", "position": ["left of", 0]}]) == [False, True, False]
    assert met([{"class": "box"}], [{"class": "box", "count": 2}]) == [True, False]
    assert met([{"class": "box"}], [{"class": "box", "count": 3}]) == [True, True]
    with pytest.raises(ValueError, match="must name an earlier entry"):
        met([{"class": "box", "position": ["left of", 0]}])


def test_geneval_asks_any_detector(tmp_path: Path) -> None:
    detector = write(tmp_path, "detector", f"""def detector(images, prompts):
    assert images.dtype.name == "uint8" and len(images) == len(prompts)
    return [[{{"box": {LEFT}, "label": "box", "score": s}} for s in (0.95, 0.5, 0.2)] for _ in prompts]
""")
    image = torch.from_numpy(scene()).permute(2, 0, 1)[None].repeat(3, 1, 1, 1) / 127.5 - 1
    wanted = [{"include": [{"class": "box", "count": 2, "color": "red"}]}, {"include": [{"class": "box", "count": 3}]},
              {"include": [{"class": "box", "count": 1}, {"class": "cat"}], "exclude": [{"class": "box", "count": 2}]}]
    # above 0.3 there are two boxes; with an exclusion one above 0.9
    assert GenEval(detector=detector)(image, CAPTIONS, wanted).tolist() == pytest.approx([1, 0, 2 / 3])
    assert GenEval(detector=detector, partial=False)(image, CAPTIONS, wanted).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="needs metadata with every prompt"):
        GenEval(detector=detector)(image, CAPTIONS, [{}, {}, {}])
    bad = write(tmp_path, "bad", "def bad(images, prompts):\n    return [[{'label': 'box'}]] * 3\n")
    with pytest.raises(ValueError, match=r"for every object, got \{'label': 'box'\}"):
        GenEval(detector=bad)(image, CAPTIONS, wanted)
    few = write(tmp_path, "few", "def few(images, prompts):\n    return []\n")
    with pytest.raises(ValueError, match="must return one list an image, 3, got 0"):
        GenEval(detector=few)(image, CAPTIONS, wanted)
    with pytest.raises(ValueError, match="module no_such_module cannot be imported"):
        GenEval(detector="no_such_module:detect")(image, CAPTIONS, wanted)


# A judge


def test_scores_are_read_strictly() -> None:
    assert read_score('{"score": 7}', 0, 10) == 7
    assert read_score('It is good. ```json\n{"why": "x", "score": 7.5}\n```', 0, 10) == 7.5
    assert read_score('{"score": 3} no, {"score": 4}', 0, 10) == 4
    for wrong in ("7", "7/10", '{"score": 11}', '{"score": "7"}', '{"score": true}', '{"score": NaN}', "{7}", ""):
        with pytest.raises(Temporary):
            read_score(wrong, 0, 10)


@pytest.fixture
def chat() -> Iterator[tuple[str, list[dict], list[str]]]:
    """A server that speaks the chat API: (url, requests, what to say next; brightness when nothing is left)."""
    seen: list[dict] = []
    texts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "token": self.headers["Authorization"], **body})
            said = texts.pop(0) if texts else json.dumps({"score": 2.0 * len(body["messages"][0]["content"][0]["text"]
                                                                             .split('"')[1])})
            answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions", seen, texts
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_judge_speaks_the_chat_api(chat, monkeypatch: pytest.MonkeyPatch) -> None:
    url, seen, texts = chat
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    judge = Judge(url=url, model="qwen", backoff_s=0.01, token_env="JUDGE_TOKEN", low=0, high=40)
    found = judge(IMAGES, ["ab", "abcd", "a"])
    assert found.tolist() == pytest.approx([4 / 40, 8 / 40, 2 / 40])  # in the order of the prompts
    request = seen[0]
    assert (request["path"], request["token"], request["model"]) == ("/v1/chat/completions", "Bearer secret", "qwen")
    text, image = request["messages"][0]["content"]
    assert "number from 0 to 40" in text["text"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    before = len(seen)
    texts[:] = ["what a picture!", '{"score": 99}']
    assert Judge(url=url, model="m", backoff_s=0.01, parallel=1)(IMAGES[:1], ["abc"]).item() == pytest.approx(0.6)
    assert len(seen) == before + 3  # asked again twice
    texts[:] = ["no"] * 2
    with pytest.raises(ValueError, match=r'failed 2 times, last with: an answer without \{"score": number from 0 to'):
        Judge(url=url, model="m", backoff_s=0.01, retries=1, parallel=1)(IMAGES[:1], ["abc"])


def test_settings_of_a_judge_are_checked() -> None:
    for wrong in ({"low": 1, "high": 1}, {"parallel": 0}, {"max_tokens": 0}, {"url": "ftp://x"}, {"timeout_s": 0}):
        with pytest.raises(ValueError, match="got"):
            Judge(**{"url": "http://x/", "model": "m", **wrong})


# Preference models


def test_hps_is_the_cosine_of_an_open_clip_model(tmp_path: Path) -> None:
    try:
        import open_clip
    except ImportError:
        with pytest.raises(ValueError, match="pip install open-clip-torch"):
            HPS(weights="none.pt")(IMAGES, CAPTIONS)
        return
    sizes = {"embed_dim": 8, "vision_cfg": {"image_size": 8, "layers": 1, "width": 64, "patch_size": 4},
             "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}
    (tmp_path / "tiny-hps.json").write_text(json.dumps(sizes))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model, _, prepare = open_clip.create_model_and_transforms("tiny-hps")
    weights = tmp_path / "hps.pt"
    torch.save({"state_dict": model.state_dict()}, weights)
    found = HPS(weights=str(weights), architecture="tiny-hps")(IMAGES, CAPTIONS)
    pixels = ((IMAGES + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        image, text, _ = model.eval()(torch.stack([prepare(Image.fromarray(one)) for one in pixels]),
                                      open_clip.get_tokenizer("tiny-hps")(CAPTIONS))
    torch.testing.assert_close(found, (image * text).sum(1))
    assert found.unique().numel() == 3
    with pytest.raises(ValueError, match=r"none\.pt does not exist; .*hf download xswu/HPSv2"):
        HPS(weights="none.pt")(IMAGES, CAPTIONS)
    with pytest.raises(ValueError, match="open_clip has no 'ViT-Z'"):
        HPS(weights=str(weights), architecture="ViT-Z")(IMAGES, CAPTIONS)
    torch.save({"state_dict": {}}, weights)
    with pytest.raises(ValueError, match="does not hold a tiny-hps"):
        HPS(weights=str(weights), architecture="tiny-hps", device="cpu:0")(IMAGES, CAPTIONS)


def blip(folder: Path) -> tuple[Path, BlipVisionModel, BlipTextModel, list[torch.nn.Linear]]:
    """A tiny checkpoint with the tensor names of ImageReward.pt, and the modules that it came from."""
    torch.manual_seed(0)
    vision = BlipVisionModel(BlipVisionConfig(hidden_size=128, intermediate_size=32, image_size=8, patch_size=4,
                                              num_hidden_layers=2, num_attention_heads=2, layer_norm_eps=1e-6)).eval()
    text = BlipTextModel(BlipTextConfig(vocab_size=12, hidden_size=64, encoder_hidden_size=128, intermediate_size=32,
                                        num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=40),
                         add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in [*vision.parameters(), *text.parameters()]:
            parameter.normal_(std=0.3)
    head = [torch.nn.Linear(a, b) for a, b in ((64, 10), (10, 8), (8, 6), (6, 4), (4, 1))]
    stored = {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    stored |= {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None], "blip.vision_proj.weight":
               torch.zeros(2, 128)}
    stored |= {f"mlp.layers.{i}.{kind}": getattr(layer, kind).detach() for i, layer in zip((0, 2, 4, 6, 7), head)
               for kind in ("weight", "bias")}
    names = {"embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
             "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
             "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
             "post_layernorm.weight": "norm.weight", "post_layernorm.bias": "norm.bias"}
    for i in range(2):
        for ours, theirs in (("layer_norm1", "norm1"), ("layer_norm2", "norm2"), ("self_attn.qkv", "attn.qkv"),
                             ("self_attn.projection", "attn.proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            names |= {f"encoder.layers.{i}.{ours}.{kind}": f"blocks.{i}.{theirs}.{kind}" for kind in ("weight", "bias")}
    stored |= {f"blip.visual_encoder.{names[name]}": value for name, value in vision.state_dict().items()}
    torch.save(stored, folder / "reward.pt")
    return folder / "reward.pt", vision, text, head


def test_image_reward_is_a_head_on_blips_first_token(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "dog", "sky", "dark"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "bert")
    weights, vision, text, head = blip(tmp_path)
    found = ImageReward(weights=str(weights), tokenizer=str(tmp_path / "bert"))(IMAGES, CAPTIONS)
    small = load_blip(str(weights), "cpu").pictures(
        images=[Image.fromarray(one) for one in ((IMAGES + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
                .numpy()], return_tensors="pt")["pixel_values"]
    assert small.shape == (3, 3, 8, 8)
    with torch.no_grad():
        for i, caption in enumerate(CAPTIONS):
            tokens = tokenizer(caption, return_tensors="pt")  # without padding: the mask hides it
            x = text(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], is_decoder=False,
                     encoder_hidden_states=vision(small[i : i + 1]).last_hidden_state).last_hidden_state[:, 0]
            for layer in head:
                x = layer(x)
            expected = (x - 0.16717362830052426) / 1.0333394966054072
            torch.testing.assert_close(found[i], expected[0, 0], atol=1e-4, rtol=1e-4)
    assert found.unique().numel() == 3


def test_image_reward_without_its_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.pt does not exist; .*hf download zai-org/ImageReward"):
        ImageReward(weights="none.pt")(IMAGES, CAPTIONS)
    weights, *_ = blip(tmp_path)
    with pytest.raises(ValueError, match=r"reward\.tokenizer: nobody/bert cannot be read"):
        ImageReward(weights=str(weights), tokenizer="nobody/bert")(IMAGES, CAPTIONS)
    stored = torch.load(weights)
    for gone in ("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight", "mlp.layers.6.bias",
                 "blip.visual_encoder.blocks.1.norm2.bias", "blip.visual_encoder.pos_embed"):
        broken = tmp_path / f"{gone}.pt"
        torch.save({name: value for name, value in stored.items() if name != gone}, broken)
        with pytest.raises(ValueError, match="is no ImageReward checkpoint"):
            ImageReward(weights=str(broken))(IMAGES, CAPTIONS)


# Several rewards

VALUES = torch.tensor([[1.0, 3.0, 2.0, 2.0], [100.0, 0.0, 400.0, 0.0]])
GROUP = torch.tensor([0, 0, 1, 1])
TERMS = (Term(weight=2.0, reward=Jpeg()), Term(weight=0.5, reward=JpegIncompressibility(), name="big"))


def test_sums_and_products() -> None:
    assert WeightedSum(terms=TERMS).combine(VALUES, GROUP, {})[0].tolist() == [52, 6, 204, 4]
    assert Product(terms=TERMS).combine(VALUES, GROUP, {})[0].tolist() == [10, 0, 80, 0]  # r^2 sqrt(s)
    with pytest.raises(ValueError, match="reward jpeg is -3 for an image, and a product"):
        Product(terms=TERMS).combine(-VALUES, GROUP, {})
    with pytest.raises(ValueError, match="exponents above 0"):
        Product(terms=(Term(weight=0.0, reward=Jpeg()),))


def test_a_normalized_sum_is_free_of_units() -> None:
    one = NormalizedSum(terms=TERMS).combine(VALUES, GROUP, {})[0]
    other = NormalizedSum(terms=TERMS).combine(VALUES * torch.tensor([[50.0], [0.1]]) + 7, GROUP, {})[0]
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    scaled = (VALUES - VALUES.mean(1, keepdim=True)) / VALUES.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(one, 2 * scaled[0] + 0.5 * scaled[1], atol=1e-3, rtol=1e-3)


def test_per_reward_normalizes_each_reward_within_its_prompt() -> None:
    # group 0: -1, 1 and 1, -1; group 1: a tie (0, 0) and 1, -1
    found = PerReward(terms=TERMS).combine(VALUES, GROUP, {})[0]
    torch.testing.assert_close(found, torch.tensor([-2 + 0.5, 2 - 0.5, 0.5, -0.5]), atol=1e-3, rtol=0)


def test_multipliers_rise_where_a_constraint_is_missed_and_fall_back_to_zero() -> None:
    reward = Constrained(reward=Jpeg(), rate=0.01, constraints=(
        Constraint(reward=JpegIncompressibility(), at_least=200.0),))
    assert [term.weight for term in reward.terms] == [1, 1]
    total, now = reward.combine(VALUES, GROUP, {})
    assert total.tolist() == VALUES[0].tolist()  # the first batch knows no multiplier
    assert now == {"jpeg_incompressibility": pytest.approx(0.75)}  # 0.01 * (200 - 125)
    total, _ = reward.combine(VALUES, GROUP, now)
    torch.testing.assert_close(total, VALUES[0] + 0.75 * (VALUES[1] - 200))
    assert reward.combine(VALUES * 9, GROUP, now)[1] == {"jpeg_incompressibility": 0.0}  # 0.75 - 9.25 < 0
    most = Constrained(reward=Jpeg(), rate=9.0, most=3.0, constraints=reward.constraints)
    assert most.combine(VALUES, GROUP, {})[1] == {"jpeg_incompressibility": 3.0}
    for wrong in ({"constraints": ()}, {"rate": 0.0}, {"start": 5.0, "most": 1.0}):
        with pytest.raises(ValueError, match="needs a constraint, rate > 0"):
            Constrained(**{"reward": Jpeg(), "constraints": reward.constraints, **wrong})


def test_names_of_terms() -> None:
    twice = WeightedSum(terms=(*TERMS, Term(weight=1.0, reward=Jpeg(quality=10))))
    assert list(named_rewards(twice)) == ["jpeg", "big", "jpeg_2"]
    assert list(named_rewards(Jpeg())) == ["reward"]
    with pytest.raises(ValueError, match="names must differ"):
        WeightedSum(terms=(*twice.terms, Term(weight=1.0, reward=Jpeg(), name="jpeg_2")))
    values = dict(zip(("jpeg", "big"), VALUES))
    assert list(overall(WeightedSum(terms=TERMS), values)) == ["reward", "jpeg", "big"]
    assert overall(WeightedSum(terms=TERMS), values)["reward"].tolist() == [52, 6, 204, 4]
    assert list(overall(PerReward(terms=TERMS), values)) == ["jpeg", "big"]
    for kind in (NormalizedSum, PerReward, Product):
        with pytest.raises(ValueError, match="at least one term"):
            kind(terms=())


def test_a_product_of_images(tmp_path: Path) -> None:
    mine = PythonFunction(function=write(tmp_path, "mine", "def mine(images, prompts, metadata):\n"
                                         "    return images.float().mean((1, 2, 3)) / 255\n"))
    both = Product(terms=(Term(weight=1.0, reward=mine), Term(weight=2.0, reward=JpegIncompressibility(), name="kb")))
    expected = mine(IMAGES, CAPTIONS) * JpegIncompressibility()(IMAGES, CAPTIONS) ** 2
    torch.testing.assert_close(both(IMAGES, CAPTIONS), expected)


def test_every_mix_can_be_written_in_a_config() -> None:
    terms = [{"weight": 1.0, "reward": {"type": "jpeg"}}]
    for name in ("weighted_sum", "product", "normalized_sum", "per_reward"):
        assert config.build(TrainingReward, {"type": name, "terms": terms}, "here").type == name
    constrained = {"type": "constrained", "reward": {"type": "ocr"},
                   "constraints": [{"at_least": 1, "reward": {"type": "geneval", "detector": "a.py:b"}}]}
    assert config.build(TrainingReward, constrained, "here").constraints[0].at_least == 1
