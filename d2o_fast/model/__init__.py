"""A Hugging Face model: loaded, taken apart into decoder and head, its adapter, its identity."""
