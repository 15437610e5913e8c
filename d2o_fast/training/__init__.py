"""The training loop and the files that it writes."""
