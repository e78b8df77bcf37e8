"""Trying again what a network or a busy store made fail: with growing, random pauses, and for a bounded time.

TAILCACHE_RETRY_SECONDS     how long one operation is tried again before it fails (default 120; 0: once only)
TAILCACHE_TIMEOUT_SECONDS   how long a request may go without a byte before it counts as failed (default 30)
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from tailcache.storage.errors import ConfigError, StorageError

__all__ = ["Failure", "Patience", "number_from_environment"]

_T = TypeVar("_T")
_LONGEST_PAUSE = 10.0


def number_from_environment(name: str, default: float) -> float:
    """A number of seconds or bytes from the environment, not negative.

    Raises:
      ConfigError: the variable is set to something else.
    """
    text = os.environ.get(name, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"environment variable {name}: expected a number that is not negative, found {text!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What an exception of a store means."""

    kind: Literal["missing", "permanent", "transient"]
    """Whether the file is not there, or trying again cannot or can help."""
    text: str
    """What came back, in one line."""
    remedy: str
    """What to do about it."""
    seconds: float = math.inf
    """For how long trying again is worth while."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often, and for how long, something is tried again."""

    seconds: float
    """No attempt begins later than this after the first one."""

    def attempt(
        self,
        action: Callable[[int], _T],
        *,
        url: str,
        doing: str,
        judge: Callable[[Exception], Failure | None],
    ) -> _T:
        """Do something until it succeeds, cannot succeed, or time is up.

        Args:
          action: what to do; it is told how many attempts failed before.
          url: what it is about, for messages.
          doing: what is tried, as in "reading".
          judge: says what an exception means; none for one that is to pass as it is.

        Raises:
          FileNotFoundError: there is no such file.
          StorageError: it failed for good, or for too long.
        """
        start = time.monotonic()
        failed = 0
        pause = min(0.05, max(0.01, self.seconds / 50))
        while True:
            try:
                return action(failed)
            except Exception as error:
                failure = judge(error)
                if failure is None:
                    raise
                if failure.kind == "missing":
                    raise FileNotFoundError(2, "no such object", url) from error
                failed += 1
                wait = pause * random.uniform(0.5, 1.5)
                spent = time.monotonic() - start
                if failure.kind == "permanent" or spent + wait > min(self.seconds, failure.seconds):
                    tried = "once" if failed == 1 else f"{failed} times in {spent:.1f} s"
                    raise StorageError(
                        f"{url}: {doing} failed, tried {tried}; the answer was: {failure.text}; {failure.remedy}"
                    ) from error
                time.sleep(wait)
                pause = min(2 * pause, _LONGEST_PAUSE)
