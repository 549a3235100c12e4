"""dgq: distribution-aware group quantization of text-to-image diffusion models, run on real integers.

Load a checkpoint and draw:

    import dgq
    pipe = dgq.load("my-checkpoint")      # or DiffusionPipeline.from_pretrained after `import dgq`
    pipe("a cat").images[0].save("cat.png")
"""

from __future__ import annotations

from .checkpoint import diffusers as _diffusers
from .checkpoint import transformers as _transformers
from .checkpoint.diffusers import DgqConfig
from .errors import DgqError
from .graphs import use_graphs
from .pictures.pipelines import load, verify
from .tuning.apply import load_tuned, set_tuned, unload_tuned
from .version import __version__

_diffusers.register()
_transformers.register()

__all__ = [
    "DgqConfig",
    "DgqError",
    "__version__",
    "load",
    "load_tuned",
    "set_tuned",
    "unload_tuned",
    "use_graphs",
    "verify",
]
