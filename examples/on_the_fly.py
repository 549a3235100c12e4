"""A float model quantized while diffusers loads it: python examples/on_the_fly.py MODEL OUT"""

import sys

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

import dgq

model, out = sys.argv[1:]
config = dgq.DgqConfig(wbits=8, abits=8, modules_to_not_convert=["time_embedding"])
mapping = PipelineQuantizationConfig(quant_mapping={"unet": config})
pipe = DiffusionPipeline.from_pretrained(model, quantization_config=mapping)
pipe.save_pretrained(out)  # a checkpoint like those of `dgq calibrate`

images = []
for one in (pipe, dgq.load(out, device="cpu")):
    generator = torch.Generator().manual_seed(1)
    images.append(one("a cat", num_inference_steps=4, generator=generator).images[0])
again = "the same" if images[0].tobytes() == images[1].tobytes() else "another"
print(f"{config}: {pipe.unet.get_memory_footprint() / 2**20:.2f} MiB, {again} picture again")
