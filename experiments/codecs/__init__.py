"""What codecs cost in quality and save in bytes, over whole runs: `python -m experiments.codecs --help`."""
