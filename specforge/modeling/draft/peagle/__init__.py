"""P-EAGLE drafts, which predict all tokens of a proposal in one pass."""
