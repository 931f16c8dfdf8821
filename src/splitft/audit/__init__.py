"""The leakage audit: what a server reads from what crosses the cut, measured on a client's own text."""
