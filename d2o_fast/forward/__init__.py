"""Token ids in, hidden states out, with each prompt read once."""
