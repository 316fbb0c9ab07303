"""Recipes and draft configs; installed as ``specforge.configs``."""
