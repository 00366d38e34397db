"""A pool inside a model."""
