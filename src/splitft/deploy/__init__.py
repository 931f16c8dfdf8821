"""A federation between machines: identities, sessions, rounds over a network, recovery."""
