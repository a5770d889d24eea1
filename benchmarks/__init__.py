"""Measurements behind the statements in README.md; each module is one command, `python -m benchmarks.NAME`."""
