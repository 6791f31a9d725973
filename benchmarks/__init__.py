"""Side by side with peers, one table each. Run as `python -m benchmarks.NAME`."""
