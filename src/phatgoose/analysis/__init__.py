"""Which experts carry which tokens and tasks."""
