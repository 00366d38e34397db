"""Groups of experts on the machines of a Ray cluster: a task for each (task), locked (lock), sent by executor."""
