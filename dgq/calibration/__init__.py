"""From a float pipeline to a checkpoint: the work behind `dgq calibrate`.

Everything is computed from the float model: one run of the pipeline records the network's inputs, the recorded inputs
are replayed through it to gather per-layer statistics, and each layer is quantized from its own statistics.
"""
