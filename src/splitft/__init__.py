"""splitft: federated split fine-tuning of language models. Importing this package does not import torch."""

__version__ = "0.1.0"
