"""Groups of experts trained on a Ray cluster."""
