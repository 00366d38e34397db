"""Many experts trained over one forward pass."""
