"""`python -m dgq_cli` is `dgq`."""

from .main import run

run()
