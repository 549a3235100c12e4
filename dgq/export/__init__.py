"""Checkpoints for other programs: a folder for plain diffusers, a file for ComfyUI; and such files read.

folder.py   dequantized, every component of the pipeline
comfy.py    the network alone, its Linear layers in int8, and back to float
names.py    what the original code of Stable Diffusion calls the tensors of diffusers' UNet
"""
