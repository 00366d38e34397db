"""Every error that a user can cause, in one tree.

    PhatgooseError
    ├── ConfigError       an option or setting that cannot be used
    ├── BaseModelError    the base model is missing, damaged or another one than expected
    ├── AdapterError      a PEFT adapter folder that cannot be an expert
    ├── GateError         a gate file that is missing, damaged or belongs elsewhere
    ├── PrototypeError    mean activations or embeddings, likewise
    ├── PoolError         a pool folder or its manifest
    ├── RouterError       a router that cannot route among these experts
    ├── DataError         training or evaluation data
    ├── SuiteError        a suite or task that does not exist or cannot be evaluated
    ├── CheckpointError   an official PHATGOOSE checkpoint that cannot be imported
    ├── ResultsError      a folder of evaluation results, or of recorded routing
    ├── ClusterError      a Ray cluster that cannot be used, or that lost a job too often
    └── HubError          pushing to or pulling from a hub

Each says what it is about, what was found, what was expected and the command
that mends it. The command line prints them and leaves with exit code 2; any
other exception, but for a disk that refuses, is a bug of ours.
"""

from __future__ import annotations


class PhatgooseError(Exception):
    """A user error.

    Args:
        what: one sentence that names the thing ("expert 'boolq' has no gate").
        found: what is there.
        expected: what should be there.
        fix: the command, or the one action, that mends it.
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
    """The base model is missing, damaged or another one than expected."""


class AdapterError(PhatgooseError):
    """A PEFT adapter folder that cannot be an expert."""


class GateError(PhatgooseError):
    """A gate file that is missing, damaged or belongs to another adapter."""


class PrototypeError(PhatgooseError):
    """Mean activations or embeddings that are missing, damaged or belong to another adapter."""


class PoolError(PhatgooseError):
    """A pool folder or its manifest."""


class RouterError(PhatgooseError):
    """A router that cannot route among these experts."""


class DataError(PhatgooseError):
    """Training or evaluation data that cannot be read."""


class SuiteError(PhatgooseError):
    """A suite or task that does not exist or cannot be evaluated."""


class CheckpointError(PhatgooseError):
    """An official PHATGOOSE checkpoint that cannot be imported."""


class ResultsError(PhatgooseError):
    """A folder of evaluation results, or of recorded routing, that is damaged, mixed or of another pool."""


class ClusterError(PhatgooseError):
    """A Ray cluster that cannot be used, or that lost a job too often."""


class HubError(PhatgooseError):
    """Pushing to or pulling from a hub failed."""
