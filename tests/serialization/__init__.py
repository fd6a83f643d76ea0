"""Adapters on the Hub and in files: a hub of our own on loopback, and everything that can be wrong with a file."""
