"""How long something is tried again."""

from __future__ import annotations

import itertools

import pytest

from tailcache.storage import retry
from tailcache.storage.errors import StorageError
from tailcache.storage.retry import Failure, Patience


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    return clock


def failing(_: int) -> None:
    raise OSError("no")


@pytest.mark.parametrize(
    ("patience", "worth_while", "limit"), [(120.0, 10.0, 10.0), (5.0, 10.0, 5.0), (60.0, None, 60.0)]
)
def test_no_attempt_begins_later(clock: Clock, patience: float, worth_while: float | None, limit: float) -> None:
    bounds = {} if worth_while is None else {"seconds": worth_while}
    with pytest.raises(StorageError, match=r"tried .* times in .*; the answer was: busy; wait"):
        Patience(seconds=patience).attempt(
            failing,
            url="s3://bucket/key",
            doing="reading",
            judge=lambda _: Failure(kind="transient", text="busy", remedy="wait", **bounds),
        )
    assert limit / 3 < clock.now <= limit


def test_it_goes_on_until_it_succeeds(clock: Clock) -> None:
    outcomes = itertools.chain([True] * 4, itertools.repeat(False))

    def action(failed: int) -> int:
        if next(outcomes):
            raise OSError("no")
        return failed

    judge = Failure(kind="transient", text="busy", remedy="wait")
    assert Patience(seconds=60).attempt(action, url="u", doing="reading", judge=lambda _: judge) == 4
    assert 0 < clock.now < 60


def test_without_credentials_it_is_soon_said() -> None:
    bucket = pytest.importorskip("tailcache.storage.bucket")
    obstore = pytest.importorskip("obstore")
    store = bucket.Bucket("s3", "bucket")
    error = obstore.exceptions.GenericError(
        "Error performing PUT http://169.254.169.254/latest/api/token - Server returned non-2xx status code: 403"
    )
    failure = store.judge(error)
    assert failure is not None
    assert failure.kind == "transient"
    assert failure.seconds == 10
    assert "no credentials found" in failure.text
    assert "AWS_ACCESS_KEY_ID" in failure.remedy
