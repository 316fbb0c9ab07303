"""The control plane of disaggregated training: the states of samples, in SQLite or Redis."""
