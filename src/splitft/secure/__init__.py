"""Secure aggregation: the server learns the sum of the clients' adapters and none of the parts."""
