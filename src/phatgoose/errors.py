"""The exceptions that a user's input can cause, in one tree.

    PhatgooseError
    ├── ConfigError       an option or setting that cannot be used
    ├── BaseModelError    a base model that is missing, damaged, or not the expected one
    ├── AdapterError      a PEFT adapter folder that cannot be an expert
    ├── GateError         a gate that is missing, damaged, or for another adapter
    ├── PrototypeError    mean activations or embeddings that are missing, damaged, or for another adapter
    ├── PoolError         a pool folder or manifest that cannot be used
    ├── RouterError       a router that cannot route among the given experts
    ├── DataError         training or evaluation data that cannot be read
    ├── SuiteError        a suite or task that does not exist or cannot be evaluated
    ├── CheckpointError   an official PHATGOOSE checkpoint that cannot be imported
    ├── ResultsError      a folder of results or recordings that is damaged, mixed, or for another pool
    ├── ClusterError      a Ray cluster that cannot be used, or that lost a job too often
    └── HubError          a push to or pull from a hub that failed

A message names the problem, what was found, what was expected, and the fix:

    expert 'boolq' has no gate
      found: no gate.safetensors
      expected: gate.safetensors
      fix: phatgoose gate pool/experts/boolq --data DATA

The command line prints it and exits with code 2. Any other exception is a bug
in this package, except an OSError with which a disk refuses to be used.
"""

from __future__ import annotations


class PhatgooseError(Exception):
    """Base class of all errors that a user's input can cause.

    Args:
        what: the problem, in one clause that names the thing ("expert 'boolq' has no gate").
        found: what was found.
        expected: what was expected.
        fix: the command, or the one action, that fixes it.
    """

    def __init__(
        self, what: str, *, found: str | None = None, expected: str | None = None, fix: str | None = None
    ) -> None:
        self.what = what
        self.found = found
        self.expected = expected
        self.fix = fix
        lines = [what]
        for label, text in (("found", found), ("expected", expected), ("fix", fix)):
            if text is not None:
                lines.append(f"  {label}: {text}")
        super().__init__("\n".join(lines))


class ConfigError(PhatgooseError):
    """An option or setting that cannot be used."""


class BaseModelError(PhatgooseError):
    """A base model that is missing, damaged, or not the expected one."""


class AdapterError(PhatgooseError):
    """A PEFT adapter folder that cannot be an expert."""


class GateError(PhatgooseError):
    """A gate that is missing, damaged, or for another adapter."""


class PrototypeError(PhatgooseError):
    """Mean activations or embeddings that are missing, damaged, or for another adapter."""


class PoolError(PhatgooseError):
    """A pool folder or manifest that cannot be used."""


class RouterError(PhatgooseError):
    """A router that cannot route among the given experts."""


class DataError(PhatgooseError):
    """Training or evaluation data that cannot be read."""


class SuiteError(PhatgooseError):
    """A suite or task that does not exist or cannot be evaluated."""


class CheckpointError(PhatgooseError):
    """An official PHATGOOSE checkpoint that cannot be imported."""


class ResultsError(PhatgooseError):
    """A folder of results or recordings that is damaged, mixed, or for another pool."""


class ClusterError(PhatgooseError):
    """A Ray cluster that cannot be used, or that lost a job too often."""


class HubError(PhatgooseError):
    """A push to or pull from a hub that failed."""
