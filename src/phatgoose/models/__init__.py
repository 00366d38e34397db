"""Base models, and surgery on them: layers of this package in place of their own."""
