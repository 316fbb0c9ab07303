"""EAGLE-3 drafts: Llama and DeepSeek layers, and their names in servers."""
