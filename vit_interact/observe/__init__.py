"""A model and images in, interactions out."""
