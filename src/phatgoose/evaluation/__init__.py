"""The paper's protocols, run as grids of methods and tasks."""
