"""Models loaded and pictures made with them."""
