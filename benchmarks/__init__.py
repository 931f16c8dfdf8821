"""Measurements of splitft against plain transformers + PEFT: speed, memory, start-up. `python -m benchmarks --help`."""
