"""The text side: a word-level tokenizer of the caption vocabulary and a small CLIP text encoder.

Legend: N captions, L = 12 tokens, C text channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from diffalign_image.shapes import COLORS, RELATIONS, SHAPES

LENGTH = 12
_BOS, _EOS, _PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the caption words, one token a word, that `save_pretrained` writes and transformers reads back."""
    words = ["a", *COLORS, *SHAPES, *dict.fromkeys(word for relation in RELATIONS for word in relation.split())]
    vocab = {token: index for index, token in enumerate([_PAD, _BOS, *words, _EOS])}
    model = Tokenizer(WordLevel(vocab, unk_token=_PAD))
    model.pre_tokenizer = WhitespaceSplit()
    model.post_processor = TemplateProcessing(single=f"{_BOS} $A {_EOS}",
                                              special_tokens=[(_BOS, vocab[_BOS]), (_EOS, vocab[_EOS])])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token=_BOS, eos_token=_EOS, pad_token=_PAD,
                                   model_max_length=LENGTH)


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> Int[Tensor, "N 12"]:
    """Token ids padded to L.

    Raises: ValueError for a word outside the vocabulary or a caption longer than L tokens.
    """
    vocabulary = tokenizer.get_vocab()
    for caption in captions:
        words = caption.split()
        unknown = [word for word in words if word not in vocabulary]
        if unknown:
            known = ", ".join(word for word in vocabulary if not word.startswith("<|"))
            raise ValueError(f"caption {caption!r} has unknown words {unknown}; the text encoder knows: {known}")
        if len(words) + 2 > LENGTH:
            raise ValueError(f"caption {caption!r} has {len(words)} words, at most {LENGTH - 2} fit")
    batch = tokenizer(list(captions), padding="max_length", max_length=LENGTH, return_tensors="pt")
    ids: Tensor = batch["input_ids"]
    return ids


def build_text_encoder(tokenizer: PreTrainedTokenizerFast, *, channels: int, layers: int) -> CLIPTextModel:
    """An untrained CLIP text encoder of this width and depth.

    Embeddings start at std 0.5 instead of CLIP's 0.02: at 0.02 the layers' outputs drown which word stands where, and
    captions act as bags of words for thousands of steps.
    """
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=channels, intermediate_size=4 * channels, num_hidden_layers=layers,
        num_attention_heads=max(1, channels // 32), max_position_embeddings=LENGTH, projection_dim=channels,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    embeddings = encoder.text_model.embeddings
    for table in (embeddings.token_embedding, embeddings.position_embedding):
        torch.nn.init.normal_(table.weight, std=0.5)
    return encoder


def encode(encoder: CLIPTextModel, tokens: Int[Tensor, "N L"]) -> dict[str, Tensor]:
    """Conditioning of the denoiser: "text" [N, L, C], every token's state, and "pooled" [N, C], the caption's."""
    out = encoder(input_ids=tokens)
    return {"text": out.last_hidden_state, "pooled": out.pooler_output}


@torch.no_grad()
def encode_captions(tokenizer: PreTrainedTokenizerFast, encoder: CLIPTextModel, captions: Sequence[str]
                    ) -> dict[str, Float[Tensor, "N *C"]]:
    """`encode` of captions, each distinct caption encoded once, without gradient."""
    distinct = list(dict.fromkeys(captions))
    encoded = encode(encoder, tokenize(tokenizer, distinct))
    rows = torch.tensor([distinct.index(caption) for caption in captions])
    return {name: leaf[rows] for name, leaf in encoded.items()}
