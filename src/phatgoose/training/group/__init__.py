"""Many experts in one forward pass of the base model: jobs are planned into groups, and a group trains as one run.

train_adapters, train_gates (train) -> AdapterRun, GateRun (adapters, gates; what they share: run)
-> groups (plan) -> for each: batches (batch, data), layers (model), values (matrix), loop (trainer)
"""
