"""Text encoders, of any class of transformers: all that dgq knows of them is where the blocks' layers are."""

from __future__ import annotations

import re
from typing import Any

from ..family import Family

# Of an encoder for text and pictures: what reads pictures.
_PICTURES = re.compile(r"(^|\.)(visual|vision\w*)\.")


class TextEncoder(Family):
    """A model of transformers that a pipeline reads prompts with: CLIP's, T5's, Qwen's, Gemma's, by their structure.

    The linear layers of its repeated blocks are quantized.
    """

    network = "PreTrainedModel"  # what all of them descend from
    title = "text encoder"
    arguments = ("input_ids", "attention_mask")
    shared_inputs = (("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("gate_proj", "up_proj"), ("wi_0", "wi_1"))

    def kept(self, name: str) -> str | None:
        if _PICTURES.search(name):
            return "reads pictures"
        return None if re.search(r"\.\d+\.", name) else "in none of the blocks"

    def run(self, network: Any, call: dict[str, Any]) -> Any:
        return network(**call)
