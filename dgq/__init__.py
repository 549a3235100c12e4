"""dgq: distribution-aware group quantization of text-to-image diffusion models, run on real integers.

Load a checkpoint and draw:

    import dgq
    pipe = dgq.load("my-checkpoint")      # or DiffusionPipeline.from_pretrained after `import dgq`
    pipe("a cat").images[0].save("cat.png")
"""

from __future__ import annotations

import logging

# transformers announces at import that torchvision is missing; no picture here goes through its image processors
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "torchvision" not in record.getMessage())

from .checkpoint.diffusers import register  # noqa: E402
from .errors import DgqError  # noqa: E402
from .pictures.pipelines import load  # noqa: E402
from .tuning.apply import load_tuned, set_tuned, unload_tuned  # noqa: E402
from .version import __version__  # noqa: E402

register()

__all__ = ["DgqError", "__version__", "load", "load_tuned", "set_tuned", "unload_tuned"]
