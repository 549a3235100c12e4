"""A dgq checkpoint in diffusers' own pipeline class: python examples/plain_diffusers.py CHECKPOINT"""

import sys

import torch
from diffusers import DiffusionPipeline

import dgq  # noqa: F401 (teaches diffusers the method "dgq"; nothing else is needed)

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], use_safetensors=True)
pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipe("a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(1)).images[0]
image.save("cat.png")
print(f"cat.png, {image.width} x {image.height}, drawn by {type(pipe).__name__}")
