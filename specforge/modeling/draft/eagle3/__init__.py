"""EAGLE-3 drafts, with a Llama or a DeepSeek layer."""
