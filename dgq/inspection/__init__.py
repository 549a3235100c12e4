"""What is in a checkpoint, and what it does to each layer."""
