"""Drawings and pages of what `vit_interact.analyze` found. Importing this imports nothing."""
