"""``tailcache train``: a student from the targets in a cache."""

from __future__ import annotations

from tailcache.trainers.config import TrainConfig

__all__ = ["run"]


def run(config: TrainConfig) -> None:
    """Train a student; the heavy imports wait until here.

    Args:
      config: the settings.

    Raises:
      TailcacheError: says where, what was expected, what was found and what to do.
    """
    from tailcache.trainers.run import train

    train(config)
