"""Lossless verification, drafters, and the reference decoder."""
