"""A base model, and surgery on its layers."""
