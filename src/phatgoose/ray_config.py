"""Settings of a run on a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from phatgoose.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """How groups of experts are spread over a Ray cluster.

    Attributes:
        address: of a running cluster; None means $RAY_ADDRESS, or else a
            cluster of this machine alone, started for the call.
        num_gpus: share of a GPU that a group takes, at most 1; None means 1
            if the cluster has GPUs.
        num_cpus: CPU cores that a group takes.
        max_retries: how often a group is begun again after its worker or
            machine was lost.
        lock_timeout_s: seconds that a task waits for another process that
            holds its group and writes no checkpoint.
    """

    address: str | None = None
    num_gpus: float | None = None
    num_cpus: float = 1
    max_retries: int = 3
    lock_timeout_s: float = 3600

    def __post_init__(self) -> None:
        if self.num_gpus is not None and not 0 <= self.num_gpus <= 1:
            raise ConfigError(
                "a group trains on one GPU", found=f"num_gpus: {self.num_gpus}", expected="a number from 0 to 1"
            )
        if not self.num_cpus > 0:
            raise ConfigError("num_cpus must be positive", found=str(self.num_cpus), expected="a number above 0")
        if self.max_retries < 0 or not self.lock_timeout_s >= 0:
            raise ConfigError(
                "max_retries and lock_timeout_s must not be negative",
                found=f"{self.max_retries} and {self.lock_timeout_s}",
            )
