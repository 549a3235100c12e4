"""Quantize a float model and write a checkpoint: python examples/calibrate.py MODEL OUT"""

import sys
from pathlib import Path

from dgq.calibration.run import Options, calibrate
from dgq.recipe import Recipe

model, out = sys.argv[1], Path(sys.argv[2])
recipe = Recipe(wbits=4, abits=8, overrides=(("*.conv_shortcut", 8),))  # the layers that match keep 8 bits
options = Options(prompts=["a cat", "a red heart", "a house"], steps=4, evaluate=2, overwrite=True)
header = calibrate(model, out, recipe, options, lambda stage, done, total, detail: print(stage, done, total, detail))

worst = min(header.calibration["sqnr_db"].items(), key=lambda item: item[1])
print(f"{len(header.layers)} layers, the worst is {worst[0]} with {worst[1]} dB")
print(f"against float: {header.calibration['fidelity']}")
