"""The integer recipe: every layer one int8 product."""
