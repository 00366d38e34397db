"""Answers and losses of a model."""
