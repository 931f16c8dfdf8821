"""Texts to token rows on clients: sources, tokens, partitions, order. Import from the modules; nothing is loaded here."""
