"""Pipelines of the real diffusers classes with random weights, small enough to train in a second."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from diffalign_image.geometry import Geometry, solve

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
TOKENS = 12
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "cat", "dog", "bright", "dark", "sky"]


def clip_tokenizer() -> CLIPTokenizer:
    """One token a letter, padded to 12."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: index for index, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=TOKENS)


def words_tokenizer() -> Tokenizer:
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    return core


def t5_tokenizer() -> PreTrainedTokenizerFast:
    core = words_tokenizer()
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
                                   model_max_length=TOKENS)


def clip_config(width: int, projection: int) -> CLIPTextConfig:
    vocabulary = 2 * len(LETTERS) + 2
    return CLIPTextConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                          num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=projection,
                          bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1)


def autoencoder(channels: int, **options: object) -> AutoencoderKL:
    return AutoencoderKL(in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 8),
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                         layers_per_block=1, norm_num_groups=4, sample_size=16, mid_block_add_attention=False,
                         **options)


def unet(width: int, **options: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
                                layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=width,
                                **options)


def ddim(**options: object) -> DDIMScheduler:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
                "set_alpha_to_one": True, "steps_offset": 1, "timestep_spacing": "trailing", **options}
    return DDIMScheduler(**settings)


def build(family: str, **scheduler: object) -> DiffusionPipeline:
    """A tiny pipeline with weights from seed 0."""
    torch.manual_seed(0)
    return {"sd15": _sd15, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "qwen_image": _qwen_image,
            "wan": _wan, "ltx": _ltx}[family](**scheduler)


def save(family: str, folder: Path, **scheduler: object) -> Path:
    build(family, **scheduler).save_pretrained(folder)
    return folder


def _sd15(**scheduler: object) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=autoencoder(4, scaling_factor=0.3), text_encoder=CLIPTextModel(clip_config(16, 16)),
        tokenizer=clip_tokenizer(), unet=unet(16), scheduler=ddim(**scheduler), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)


def _sdxl(**scheduler: object) -> StableDiffusionXLPipeline:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
             "projection_class_embeddings_input_dim": 6 * 4 + 16, "use_linear_projection": True}
    return StableDiffusionXLPipeline(
        vae=autoencoder(4, scaling_factor=0.13), text_encoder=CLIPTextModel(clip_config(16, 16)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(16, 16)), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=unet(32, **added), scheduler=ddim(**scheduler))


def _sd3(**scheduler: object) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=16)
    encoders = [CLIPTextModelWithProjection(clip_config(16, 16)) for _ in range(2)]
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=autoencoder(4, scaling_factor=1.5, shift_factor=0.06), text_encoder=encoders[0], tokenizer=clip_tokenizer(),
        text_encoder_2=encoders[1], tokenizer_2=clip_tokenizer(), text_encoder_3=_t5(), tokenizer_3=t5_tokenizer())


def _flux(**scheduler: object) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 8))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=autoencoder(4, scaling_factor=0.4, shift_factor=0.1),
        text_encoder=CLIPTextModel(clip_config(16, 16)), tokenizer=clip_tokenizer(), text_encoder_2=_t5(),
        tokenizer_2=t5_tokenizer(), transformer=transformer)


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=11, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _qwen_image(**scheduler: object) -> QwenImagePipeline:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": len(WORDS), "max_position_embeddings": 256,
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4))
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
                                 latents_mean=[0.1, 0.0, -0.1, 0.2], latents_std=[2.0, 2.5, 3.0, 3.5])
    settings = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192,
                "shift_terminal": 0.02, **scheduler}
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**settings), vae=vae, transformer=transformer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words_tokenizer(), unk_token="<unk>", eos_token="</s>",
                                          pad_token="<pad>"))


def _wan(**scheduler: object) -> WanPipeline:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32)
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
                           scale_factor_spatial=2, scale_factor_temporal=2, latents_mean=[0.1, 0.0, -0.1, 0.2],
                           latents_std=[2.0, 2.5, 3.0, 3.5])
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=32, num_layers=1,
                                          num_heads=2))
    return WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=encoder, vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}))


def _ltx(**scheduler: object) -> LTXPipeline:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=32)
    scaled = (True, False, False, False)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=scaled, decoder_spatio_temporal_scaling=scaled,
        upsample_factor=(1,) * 4, patch_size=2, patch_size_t=1, scaling_factor=0.5)
    vae.latents_mean.copy_(torch.linspace(-0.2, 0.2, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 1.5, 8))
    settings = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
                "shift_terminal": 0.1, **scheduler}
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**settings), vae=vae, text_encoder=_t5(), tokenizer=t5_tokenizer(),
        transformer=transformer)


def geometry(prompts: int, images_per_prompt: int) -> Geometry:
    """One process and room for all images."""
    images = prompts * images_per_prompt
    return solve(prompts=prompts, images_per_prompt=images_per_prompt, processes=1, batch_rows=images,
                 microbatch_rows=images, rows_per_image=1, epochs=1, minibatches=1)
