"""Judging quantization by its pictures: fidelity, alignment, distribution (`dgq eval`)."""
