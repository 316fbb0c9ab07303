"""Multi-token prediction modules, as targets such as DeepSeek-V3 carry them."""
