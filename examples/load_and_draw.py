"""Load a model, quantized or float, and draw: python examples/load_and_draw.py [MODEL] [PROMPT]"""

import sys
from pathlib import Path

import dgq
from dgq.pictures.generation import Settings, generate
from dgq.pictures.pipelines import resolve

folder = resolve(sys.argv[1] if len(sys.argv) > 1 else None)  # a folder, a hub id, or the embedded model
prompt = sys.argv[2] if len(sys.argv) > 2 else "a cat"
pipe = dgq.load(folder)  # an ordinary diffusers pipeline: pipe("a cat").images[0] works too
settings = Settings(seed=1).resolved(folder)  # steps and guidance are the model's own
for picture in generate(pipe, [prompt, prompt], settings):  # picture i has seed + i, however they are batched
    file = Path(f"picture-{picture.seed}.png")
    picture.save(file)  # with prompt, seed and settings in the PNG
    print(file)
