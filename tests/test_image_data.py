"""Captioned shapes, the caption tokenizer, and the rewards that read pixels."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from diffalign_image import rewards, shapes, text, verifiable


@pytest.fixture(scope="module")
def rendered() -> tuple[Tensor, list[shapes.Scene]]:
    images, captions = shapes.training_batch(384, torch.Generator().manual_seed(0))
    return images, [shapes.parse(caption) for caption in captions]


def score(images: Tensor, scenes: list[shapes.Scene]) -> Tensor:
    return verifiable.read(images, scenes).score()


def test_rendering_is_deterministic_and_varied() -> None:
    def draw(seed: int) -> tuple[Tensor, list[str]]:
        return shapes.training_batch(16, torch.Generator().manual_seed(seed))

    (one, captions), (same, same_captions), (other, _) = draw(1), draw(1), draw(2)
    assert torch.equal(one, same)
    assert captions == same_captions
    assert not torch.equal(one, other)
    scene = [shapes.scenes("train")[0]] * 2
    twice = shapes.render(scene, torch.Generator().manual_seed(0))
    assert not torch.equal(twice[0], twice[1])
    assert one.shape == (16, 3, 32, 32)
    assert one.abs().max() <= 1


def test_splits_are_disjoint_complete_and_share_no_scene_said_the_other_way_round() -> None:
    train, held_out = shapes.scenes("train"), shapes.scenes("held_out")
    assert len(train) + len(held_out) == 6 * 5 * 3 * 3 * 4
    assert 0.17 < len(held_out) / 1080 < 0.24
    captions = {scene.caption for scene in train}
    assert len(captions) == len(train)
    for scene in held_out:
        assert scene.caption not in captions
        reverse = shapes.Scene(scene.colors[::-1], scene.shapes[::-1], scene.relation ^ 1)
        assert reverse.caption not in captions


def test_training_batches_never_hold_a_held_out_caption() -> None:
    _, captions = shapes.training_batch(3000, torch.Generator().manual_seed(3))
    assert not any(shapes.parse(caption).held_out for caption in captions)


def test_caption_round_trip_and_refusal() -> None:
    scene = shapes.scenes("held_out")[5]
    assert shapes.parse(scene.caption) == scene
    assert shapes.parse("a red circle above a blue square").colors == (0, 2)
    for wrong in ("a red circle", "a red circle above a red square", "a pink circle above a blue square"):
        with pytest.raises(ValueError, match="for example 'a red circle above a blue square'"):
            shapes.parse(wrong)


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_every_shape_covers_the_area_it_was_asked_for(name: str) -> None:
    index = torch.tensor([shapes.SHAPES.index(name)])
    cover = shapes.coverage(torch.tensor([[16.0, 16.0]]), torch.tensor([90.0]), index)[0]
    assert cover.sum().item() == pytest.approx(90, rel=0.05)
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    assert ((cover * x).sum() / cover.sum()).item() == pytest.approx(16, abs=0.05)
    assert ((cover * y).sum() / cover.sum()).item() == pytest.approx(16, abs=0.35)


def test_score_of_true_renders_is_one(rendered: tuple[Tensor, list[shapes.Scene]]) -> None:
    parts = verifiable.read(*rendered)
    assert parts.score().mean() >= 0.97
    assert parts.all_right.float().mean() >= 0.97
    held_out = list(shapes.scenes("held_out"))
    assert score(shapes.render(held_out, torch.Generator().manual_seed(1)), held_out).mean() >= 0.97


def test_score_loses_exactly_the_part_that_is_wrong(rendered: tuple[Tensor, list[shapes.Scene]]) -> None:
    images, scenes = rendered
    turned = verifiable.read(images, [replace(s, relation=s.relation ^ 1) for s in scenes])
    assert turned.relation.max() == 0
    assert turned.score().mean() == pytest.approx(0.8, abs=0.02)
    across = verifiable.read(images, [replace(s, relation=(s.relation + 2) % 4) for s in scenes])
    assert across.relation.mean() < 0.05
    others = [replace(s, shapes=((s.shapes[0] + 1) % 3, (s.shapes[1] + 2) % 3)) for s in scenes]
    reshaped = verifiable.read(images, others)
    assert reshaped.shape.mean() < 0.02
    assert reshaped.score().mean() == pytest.approx(0.6, abs=0.02)
    absent = [replace(s, colors=tuple(c for c in range(len(shapes.COLORS)) if c not in s.colors)[:2]) for s in scenes]  # type: ignore[arg-type]
    assert score(images, absent).max() < 0.05


def test_blank_noise_and_smooth_color_fields_score_nothing(rendered: tuple[Tensor, list[shapes.Scene]]) -> None:
    _, scenes = rendered
    generator = torch.Generator().manual_seed(0)
    n = len(scenes)
    fields = interpolate(1.5 * torch.randn(n, 3, 5, 5, generator=generator), size=32, mode="bicubic")
    for image in (torch.zeros(n, 3, 32, 32), torch.ones(n, 3, 32, 32), torch.randn(n, 3, 32, 32, generator=generator),
                  torch.rand(n, 3, 32, 32, generator=generator) * 2 - 1, fields):
        assert score(image.clamp(-1, 1), scenes).mean() < 0.02
    halves = torch.zeros(n, 3, 32, 32)
    palette = shapes.palette()
    for i, scene in enumerate(scenes):  # half the image in each stated color: too large to be an object
        halves[i, :, :16] = palette[scene.colors[0]][:, None, None]
        halves[i, :, 16:] = palette[scene.colors[1]][:, None, None]
    assert score(halves, scenes).max() < 0.02


def test_blobs_get_their_color_but_not_their_shape(rendered: tuple[Tensor, list[shapes.Scene]]) -> None:
    images, scenes = rendered
    kernel = torch.exp(-torch.linspace(-1.6, 1.6, 13) ** 2)
    weight = (kernel[:, None] * kernel[None]) / kernel.sum() ** 2
    blurred = conv2d(pad(images, (6,) * 4, mode="replicate").reshape(-1, 1, 44, 44), weight[None, None])
    parts = verifiable.read((1.8 * blurred.reshape(-1, 3, 32, 32)).clamp(-0.9, 0.9), scenes)
    kinds = torch.tensor([scene.shapes for scene in scenes])
    not_round = kinds != shapes.SHAPES.index("circle")
    assert parts.color.mean() > 0.9
    assert parts.shape[not_round].mean() < 0.25


def test_extra_objects_cost_score(rendered: tuple[Tensor, list[shapes.Scene]]) -> None:
    images, scenes = rendered
    littered = images.clone()
    for i, scene in enumerate(scenes):  # a frame in a color that the caption does not name
        color = shapes.palette()[next(c for c in range(len(shapes.COLORS)) if c not in scene.colors)][:, None, None]
        littered[i, :, :3], littered[i, :, -3:] = color, color
        littered[i, :, :, :3], littered[i, :, :, -3:] = color, color
    assert score(littered, scenes).max() < 0.05


def test_jpeg_size_is_the_file_size_and_orders_content() -> None:
    images, captions = shapes.training_batch(8, torch.Generator().manual_seed(0))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    blank = rewards.jpeg_kb(torch.zeros_like(images))
    clean, noisy = rewards.jpeg_kb(images), rewards.jpeg_kb(images + 0.1 * noise)
    assert (blank < clean).all()
    assert (clean < noisy).all()
    assert 0.2 < blank[0] < 0.4  # a JPEG header
    assert (rewards.jpeg_kb(images, 50) < clean).all()
    assert torch.equal(rewards.Jpeg()(images, captions), -clean)
    with pytest.raises(ValueError, match="quality must lie in"):
        rewards.Jpeg(quality=101)


def test_weighted_sum_adds_and_refuses_nothing() -> None:
    images, captions = shapes.training_batch(4, torch.Generator().manual_seed(0))
    both = rewards.WeightedSum(terms=(rewards.Term(weight=2.0, reward=rewards.Jpeg()),
                                      rewards.Term(weight=0.5, reward=rewards.Verifiable())))
    expected = 2 * rewards.Jpeg()(images, captions) + 0.5 * rewards.Verifiable()(images, captions)
    torch.testing.assert_close(both(images, captions), expected)
    with pytest.raises(ValueError, match="at least one term"):
        rewards.WeightedSum(terms=())


def test_tokenizer_gives_one_token_a_word_and_refuses_unknown_words() -> None:
    tokenizer = text.build_tokenizer()
    ids = text.tokenize(tokenizer, ["a red circle above a blue square", "a red circle left of a blue square"])
    assert ids.shape == (2, text.LENGTH)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert ids[0, 8] == tokenizer.eos_token_id
    assert ids[1, 9] == tokenizer.eos_token_id
    assert (ids[0, 9:] == tokenizer.pad_token_id).all()
    assert ids[0, 1] == ids[0, 5]  # both are "a"
    with pytest.raises(ValueError, match=r"unknown words \['pink'\]"):
        text.tokenize(tokenizer, ["a pink circle above a blue square"])
    with pytest.raises(ValueError, match="at most 10 fit"):
        text.tokenize(tokenizer, ["a " * 11])


def test_text_encoder_reads_the_end_token_and_encodes_each_caption_once() -> None:
    tokenizer = text.build_tokenizer()
    encoder = text.build_text_encoder(tokenizer, channels=32, layers=1)
    captions = ["a red circle above a blue square", "a red circle below a blue square"]
    cond = text.encode_captions(tokenizer, encoder, [captions[0], captions[1], captions[0]])
    assert cond["text"].shape == (3, text.LENGTH, 32)
    assert torch.equal(cond["pooled"][0], cond["pooled"][2])
    assert not torch.allclose(cond["pooled"][0], cond["pooled"][1])
    torch.testing.assert_close(cond["pooled"][0], cond["text"][0, 8])  # the state of <|endoftext|>
