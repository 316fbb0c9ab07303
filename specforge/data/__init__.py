"""Conversations to token ids and loss masks, and the draft vocabulary."""
