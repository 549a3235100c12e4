"""Building and training the embedded model ``dgq-emoji`` (see ``embedded/README.md``)."""
