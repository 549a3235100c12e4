from collections.abc import Iterator

import pytest
import torch

from dgq import range_search


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """The range search has its own tests: a few candidates do here. And tiny tensors need no threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(range_search, "SHRINK_FACTORS", (1.0, 0.9, 0.8))
        yield
    torch.set_num_threads(threads)
