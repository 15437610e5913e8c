"""A Hugging Face model: loading, decoder and head, adapter, identity."""
