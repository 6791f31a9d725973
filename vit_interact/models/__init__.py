"""Flax linen models and their weights."""
