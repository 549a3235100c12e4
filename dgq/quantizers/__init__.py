"""Quantizers: weights, input channels, and the published activation groups."""
