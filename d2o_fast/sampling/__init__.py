"""Responses drawn from the model, in this process or on a server."""
