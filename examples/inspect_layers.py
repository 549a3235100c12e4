"""What is in a checkpoint and which layers deserve more bits: python examples/inspect_layers.py CHECKPOINT"""

import sys

from dgq.inspection.inspect import inspect

found = inspect(sys.argv[1], worst=5, budget=0.05)  # reads headers alone; overrides may add 5 % to the file
print(
    f"{found.label}: {found.unet_bytes} bytes, {found.ratio:.0%} of float16, {found.bits_per_weight:.2f} bits a weight"
)
for layer in found.worst:
    print(f"{layer.sqnr_db:6.1f} dB  W{layer.wbits}A{layer.abits}  {layer.channels:<6}  {layer.name}")
if found.suggestion is not None:
    print(found.suggestion.command_line)
