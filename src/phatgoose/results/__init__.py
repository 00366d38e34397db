"""What was measured: rows, intervals and comparisons. NumPy only, torch never."""
