"""Live speech: blocks of a stream become turns with emotions while the call runs."""
