"""Layers that all draft families share: the decoder layer, its attention, and decoding with a cache."""
