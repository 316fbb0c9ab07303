"""Training checkpoints as files."""
