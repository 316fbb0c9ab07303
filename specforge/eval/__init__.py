"""Acceptance length, measured exactly offline and by decoding; its intervals, cache and reports."""
