"""Block drafts: DFlash, DFlash-2, Domino and DSpark."""
