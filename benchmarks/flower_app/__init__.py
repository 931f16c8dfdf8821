"""Federated LoRA as a Flower app: what the benchmark `flower` sets beside the cohort engine.

Runs under a Python of its own (`--flower-python`), which has flwr[simulation], torch, transformers and peft, and not splitft.
"""
