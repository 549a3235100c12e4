"""Personalising an integer checkpoint by its scales alone: the work behind `dgq tune` (docs/tuning.md)."""
