"""The text encoder's layout, and how captions become its input and output."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 256


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = WIDTH, layers: int = 2) -> CLIPTextModel:
    """A small causal text encoder for a tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions -> ids (B, L), padded and cut to the tokenizer's length."""
    encoded = tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    return encoded.input_ids


def embed(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions -> what the UNet attends to, (B, L, width)."""
    return encoder(token_ids(tokenizer, captions)).last_hidden_state


@torch.no_grad()
def embed_frozen(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """``embed`` without gradients."""
    return embed(encoder, tokenizer, captions)
