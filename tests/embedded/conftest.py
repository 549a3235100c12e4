"""A tiny model and tiny data, for tests of training and export."""

import random

import pytest
import torch

from embedded.cache_latents import Latents
from embedded.captions import BACKGROUNDS, STYLES, Concept, Sampler
from embedded.text_model import build_text_encoder
from embedded.tokenizer import build_tokenizer
from embedded.train_unet import Inputs, build_unet

CONCEPTS = [Concept("1", ("a cat", "a kitten"), common=True), Concept("2", ("a dog",))]


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return build_tokenizer(["a cat", "a kitten", "a dog in 3d style on a blue background"], 600)


@pytest.fixture
def tiny_inputs(tiny_tokenizer):
    styles = list(STYLES)
    rows = {(index, style): index * len(styles) + place for index in range(2) for place, style in enumerate(styles)}
    values = torch.randn(len(rows), 1 + len(BACKGROUNDS), 8, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    sampler = Sampler(CONCEPTS, {0: styles, 1: styles})
    return Inputs(sampler, Latents(values, 2, 1), rows, tiny_tokenizer)


@pytest.fixture
def tiny_models(tiny_tokenizer):
    torch.manual_seed(0)
    random.seed(0)
    return build_unet((8, 16), text_width=16, head_dim=8), build_text_encoder(tiny_tokenizer, width=16, layers=1)
