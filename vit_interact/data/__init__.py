"""Images in: files found, decoded and brought to the shape a model wants."""
