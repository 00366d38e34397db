"""Training of adapters and gates: one (single), many over one forward pass (group), many machines (cluster)."""
