"""The processes that a benchmark starts: `python -m dgq.bench write TASK JSON` and `python -m dgq.bench work JSON`."""

import sys

from diffusers.utils import logging

from . import files, worker

if __name__ == "__main__":
    logging.disable_progress_bar()
    {"write": files.main, "work": worker.main}[sys.argv[1]](*sys.argv[2:])
