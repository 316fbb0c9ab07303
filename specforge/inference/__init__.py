"""Producing features: the target engine, the rollout worker, the target's own answers."""
