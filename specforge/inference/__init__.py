"""Inference with the target: its files and head, engines, the server, producers, and regeneration of answers."""
