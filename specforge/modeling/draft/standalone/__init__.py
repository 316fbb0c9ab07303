"""Drafts that are small language models of their own."""
