"""A checkpoint's pictures beside the float model's: python examples/compare_with_float.py CHECKPOINT [FLOAT]"""

import sys

import torch

import dgq
from dgq.pictures.fidelity import compare
from dgq.pictures.generation import Settings, generate
from dgq.pictures.pipelines import float_base, resolve

folder = resolve(sys.argv[1])
base = float_base(folder, *sys.argv[2:3])  # by default the model that the checkpoint was made of
settings = Settings(steps=4, seed=7).resolved(folder)
prompts = ["a dog", "a tree"]
reference, pictures = (generate(dgq.load(path, dtype=torch.float32), prompts, settings) for path in (base, folder))
for name, value in compare(reference, pictures).items():
    print(f"{name}: {value:.4g}")
