"""Secure aggregation: the letters that sum the clients' adapters show the sum and none of the parts.

A server that also takes part in the training can compute each part again from activations, labels and gradients, or arrange that the
sum is one client's (docs/privacy.md): what is protected is the aggregation's side alone, its logs, checkpoints and memory of updates.
"""
