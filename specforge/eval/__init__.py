"""Acceptance length, replayed offline and measured by decoding; its intervals, cache and reports."""
