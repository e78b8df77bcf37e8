"""One bucket of an object store: requests that are checked, retried and explained.

obstore (Rust) makes the requests. It retries some of what can go wrong, but not all of it (a listing cut short, a
conditional write that timed out), and takes a short body with a matching Content-Length for a full one. So it makes
every request once, the answer is held against what it promised, and trying again is left to ``retry``. Only the parts
of a large upload are retried by obstore as well, for they would otherwise all be sent again.

obstore's threads do not live on in a forked process, where its first request would wait for ever: here that is an
error.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from tailcache.storage.errors import ConfigError, StorageError, TailcacheError
from tailcache.storage.retry import Failure, Patience, number_from_environment

__all__ = ["PIECE", "Bucket", "Piece", "version_of"]

_T = TypeVar("_T")
PIECE = 16 << 20
"""Bytes of the largest request for reading."""
_PART = 16 << 20  # bytes of the largest request for writing; S3 takes no less than 5 MiB
_PARALLEL = 8
_CLOCK_SECONDS = 300.0  # how long a look at the store's clock is good for
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true where the bucket is public",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true where the bucket is public",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_SKIP_SIGNATURE=true where it is public",
}
_PASSING_STATUS = {"408", "409", "425", "429"}
_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    "RequestTimeTooSkewed",
    "RequestTimeout",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}

_runtime_process: int | None = None
"""The process in which obstore's threads were started, or that of which this one is a fork."""


_NO_CREDENTIALS_SECONDS = 10.0
"""A machine in a cloud may have to wait for its credentials, a laptop that has none never gets any."""


class _Unexpected(Exception):
    """An answer with fewer or other bytes than it promised."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of an object."""

    data: bytes
    size: int
    """Bytes of the whole object."""
    tag: str | None
    """The object's entity tag: another one means another content."""


class Bucket:
    """One bucket: requests with retries, errors in this package's words."""

    def __init__(self, kind: str, bucket: str) -> None:
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import AzureStore, GCSStore, S3Store
        except ImportError as error:
            raise ConfigError(
                f"{kind}://{bucket}: expected the package obstore, found that it is not installed; install it with "
                "pip install 'tailcache[remote]'"
            ) from error
        self.kind, self.name = kind, bucket
        self.obs: Any = obstore
        self.errors = exceptions
        self.patience = Patience(seconds=number_from_environment("TAILCACHE_RETRY_SECONDS", 120))
        timeout = max(0.1, number_from_environment("TAILCACHE_TIMEOUT_SECONDS", 30))
        kinds: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
        settings: dict[str, Any] = {}
        if kind == "s3" and "AWS_CHECKSUM_ALGORITHM" not in os.environ:
            settings["checksum_algorithm"] = "SHA256"

        def make(retries: int, options: dict[str, Any]) -> Any:
            retry = {
                "max_retries": retries,
                "retry_timeout": timedelta(seconds=self.patience.seconds),
                "backoff": {"init_backoff": timedelta(seconds=min(0.1, self.patience.seconds / 50 + 0.001))},
            }
            common = {"connect_timeout": timedelta(seconds=min(timeout, 10)), **_client_options(kind)}
            try:
                return kinds[kind](bucket, client_options={**common, **options}, retry_config=retry, **settings)
            except (exceptions.BaseError, ValueError) as error:
                raise ConfigError(
                    f"{self.url()}: {_first_line(error)}; check the settings in the environment"
                ) from error

        # Reading has stalled when no byte came for some time; a body that is sent is timed as a whole.
        self.reading = make(0, {"read_timeout": timedelta(seconds=timeout), "timeout": timedelta(hours=1)})
        self.writing = make(0, {"timeout": timedelta(seconds=4 * timeout)})
        self.sending_parts = make(4, {"timeout": timedelta(seconds=4 * timeout)})
        # Threads begin when they are first needed. Two pools, for one that waited for itself would wait for ever.
        self._piece_pool = ThreadPoolExecutor(_PARALLEL, "tailcache-pieces")
        self._object_pool = ThreadPoolExecutor(_PARALLEL, "tailcache-objects")
        self._clock: tuple[float, float] | None = None

    def url(self, key: str = "") -> str:
        """How to call an object in messages."""
        return f"{self.kind}://{self.name}" + (f"/{key}" if key else "")

    def check_process(self, key: str) -> None:
        """Refuse to work in a fork of a process that has made requests."""
        global _runtime_process
        if _runtime_process is None:
            _runtime_process = os.getpid()
        elif _runtime_process != os.getpid():
            raise StorageError(
                f"{self.url(key)}: this process was forked from one that had opened a remote cache, and cannot use its "
                'connections; start worker processes with the method "spawn" or "forkserver"'
            )

    def attempt(self, action: Callable[[int], _T], key: str, doing: str, *, patient: bool = True) -> _T:
        """Make one request, or few, until they succeed."""
        self.check_process(key)
        patience = self.patience if patient else Patience(seconds=0)
        return patience.attempt(action, url=self.url(key), doing=doing, judge=self.judge)

    def judge(self, error: Exception) -> Failure | None:
        """What an exception of obstore means; none for those that are not about the store."""
        errors = self.errors
        again = (
            "check the network and the store, then run the same command again; what is committed stays good "
            f"(TAILCACHE_RETRY_SECONDS, now {self.patience.seconds:g}, is how long is tried)"
        )
        if isinstance(error, TailcacheError):
            return None
        if isinstance(error, _Unexpected):
            return Failure(kind="transient", text=str(error), remedy=again)
        text = _summary(error)
        if isinstance(error, FileNotFoundError):
            if "NoSuchBucket" in str(error):
                return Failure(kind="permanent", text=text, remedy=f"make the bucket {self.url()}, or correct its name")
            return Failure(kind="missing", text=text, remedy="")
        if isinstance(error, errors.PreconditionError | errors.AlreadyExistsError | errors.NotModifiedError):
            return None
        credentials = f"check the credentials ({_CREDENTIALS[self.kind]}) and what they allow in {self.url()}"
        if isinstance(error, errors.PermissionDeniedError | errors.UnauthenticatedError | PermissionError):
            passing = any(code in str(error) for code in _PASSING_CODES)
            return Failure(kind="transient" if passing else "permanent", text=text, remedy=credentials)
        if not isinstance(error, errors.BaseError | OSError):
            return None
        if "NoSuchBucket" in str(error):
            return Failure(kind="permanent", text=text, remedy=f"make the bucket {self.url()}, or correct its name")
        if re.search(r"latest/(api/token|meta-data)|metadata\.google|169\.254\.169\.254", text):
            found = f"no credentials found ({text})"
            return Failure(kind="transient", text=found, remedy=credentials, seconds=_NO_CREDENTIALS_SECONDS)
        status = re.search(r"status code: (\d{3})", text)
        if status is None or status[1] in _PASSING_STATUS or (status[1].startswith("5") and status[1] != "501"):
            return Failure(kind="transient", text=text, remedy=again)
        if any(code in str(error) for code in _PASSING_CODES):
            return Failure(kind="transient", text=text, remedy=again)
        region = ", AWS_REGION and AWS_ENDPOINT_URL" if self.kind == "s3" else ""
        return Failure(kind="permanent", text=text, remedy=f"check the name of the bucket{region}; {credentials}")

    def map(self, action: Callable[[Any], _T], items: Sequence[Any]) -> list[_T]:
        """Do something for several pieces of an object at once, at most eight at a time."""
        return _at_once(self._piece_pool, action, items)

    def map_objects(self, action: Callable[[Any], _T], items: Sequence[Any]) -> list[_T]:
        """Do something for several objects at once; it may in turn read pieces of them at once."""
        return _at_once(self._object_pool, action, items)

    # -- reading -----------------------------------------------------------------------------------------------

    def head(self, key: str) -> Any:
        """Size, entity tag and so on of an object."""
        return self.attempt(lambda _: self.obs.head(self.reading, key), key, "looking at it")

    def piece(self, key: str, first: int, last: int) -> Piece:
        """One range of an object, cut where the object ends.

        Args:
          key: the object.
          first: the first byte; counted from the end where it is negative, and then ``last`` does not matter.
          last: one past the last byte, beyond ``first``.
        """

        def get(_: int) -> Piece:
            wanted: Any = {"suffix": -first} if first < 0 else (first, last)
            try:
                answer = self.obs.get(self.reading, key, options={"range": wanted})
            except self.errors.BaseError as error:
                # A range of nothing: stores answer with an error, of several kinds.
                if "416" not in str(error) and "NotPartial" not in str(error):
                    raise
                found = self.obs.head(self.reading, key)
                if found["size"] > max(first, 0):
                    raise
                return Piece(data=b"", size=int(found["size"]), tag=found.get("e_tag"))
            size = int(answer.meta["size"])
            start, stop = (max(0, size + first), size) if first < 0 else (first, min(last, size))
            data = bytes(answer.bytes())
            if tuple(answer.range) != (start, stop) or len(data) != stop - start:
                raise _Unexpected(
                    f"expected the {stop - start} bytes {start} to {stop} of {size}, found {len(data)} bytes that are "
                    f"said to be {answer.range[0]} to {answer.range[1]}"
                )
            return Piece(data=data, size=size, tag=answer.meta.get("e_tag"))

        return self.attempt(get, key, "reading")

    def pieces(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges of one version of an object, at most eight at once."""

        def get(_: int) -> list[bytes]:
            found = self.map(lambda r: self.piece(key, *r), ranges)
            self.check_one_version(found)
            return [piece.data for piece in found]

        return self.attempt(get, key, "reading")

    def check_one_version(self, pieces: list[Piece]) -> None:
        """Refuse pieces of which one was read before, another after the object was replaced."""
        if len({(piece.tag, piece.size) for piece in pieces}) > 1:
            raise _Unexpected("the object was replaced while it was being read")

    def whole(self, key: str) -> bytes:
        """All of an object, of one version: its first piece, which tells its size, then the rest."""

        def get(_: int) -> bytes:
            begin = self.piece(key, 0, PIECE)
            rest = [(first, min(first + PIECE, begin.size)) for first in range(PIECE, begin.size, PIECE)]
            found = self.map(lambda r: self.piece(key, *r), rest)
            self.check_one_version([begin, *found])
            return begin.data if not found else b"".join([begin.data, *(piece.data for piece in found)])

        return self.attempt(get, key, "reading")

    def content(self, key: str) -> tuple[bytes, Any]:
        """A small object and its metadata, in one request."""

        def get(_: int) -> tuple[bytes, Any]:
            answer = self.obs.get(self.reading, key)
            data, meta = bytes(answer.bytes()), answer.meta
            if len(data) != int(meta["size"]):
                raise _Unexpected(f"expected {meta['size']} bytes, found {len(data)}")
            return data, meta

        return self.attempt(get, key, "reading")

    # -- writing -----------------------------------------------------------------------------------------------

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write an object, or replace it."""
        if len(data) <= _PART:
            self.attempt(lambda _: self.obs.put(self.writing, key, data, use_multipart=False), key, "writing")
            return
        self.attempt(
            lambda _: self.obs.put(self.sending_parts, key, data, chunk_size=_PART, max_concurrency=4), key, "writing"
        )

    def put_if(self, key: str, data: bytes | memoryview, mode: Any, *, patient: bool = True) -> Any | None:
        """Write an object if the store finds a condition met; what ``replace`` needs to know of it, or none.

        An attempt can succeed though its answer is lost, and then the next one finds the condition not met: so where an
        earlier attempt failed, what is there now is compared with what was to be written.
        """

        def put(failed: int) -> Any | None:
            try:
                return version_of(self.obs.put(self.writing, key, data, mode=mode))
            except (self.errors.AlreadyExistsError, self.errors.PreconditionError):
                return self.holding(key, data) if failed else None
            except FileNotFoundError:
                if mode == "create":
                    raise  # no bucket
                return None

        return self.attempt(put, key, "writing", patient=patient)

    def holding(self, key: str, data: bytes | memoryview) -> Any | None:
        """The version of an object if its content is this, else none."""
        try:
            found, meta = self.content(key)
        except FileNotFoundError:
            return None
        return version_of(meta) if found == data else None

    def delete(self, keys: list[str]) -> None:
        """Delete objects; fine if they are not there."""

        def delete(_: int) -> None:
            try:
                self.obs.delete(self.writing, keys)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                if len(keys) > 1:
                    for key in keys:
                        self.delete([key])

        if keys:
            self.attempt(delete, keys[0], "deleting")

    def clock(self, key: str) -> float:
        """The store's own time, in seconds since 1970, about a second late; a probe beside the object is written."""
        if self._clock is None or time.monotonic() - self._clock[0] > _CLOCK_SECONDS:
            probe = f"{key}.{uuid.uuid4().hex}.tmp"
            self.put(probe, b"")
            now = time.monotonic()
            try:
                self._clock = now, self.head(probe)["last_modified"].timestamp()
            finally:
                self.delete([probe])
        return self._clock[1] + time.monotonic() - self._clock[0]


def _at_once(pool: ThreadPoolExecutor, action: Callable[[Any], _T], items: Sequence[Any]) -> list[_T]:
    return [action(item) for item in items] if len(items) <= 1 else list(pool.map(action, items))


def _client_options(kind: str) -> dict[str, Any]:
    """What obstore would read from the environment if it were not given options of its own."""
    prefix = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}[kind]
    options: dict[str, Any] = {}
    for name in ("allow_http", "allow_invalid_certificates"):
        if os.environ.get(f"{prefix}_{name.upper()}", "").lower() in ("1", "true", "yes", "on"):
            options[name] = True
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT") if kind == "s3" else ():
        if os.environ.get(name, "").lower().startswith("http://") and "allow_http" not in options:
            raise ConfigError(
                f"environment variable {name}: expected https, found {os.environ[name]}; set AWS_ALLOW_HTTP=true where "
                "plain http is meant"
            )
    if kind == "s3" and os.environ.get("AWS_CA_BUNDLE"):
        try:
            options["root_certificate"] = Path(os.environ["AWS_CA_BUNDLE"]).read_bytes()
        except OSError as error:
            raise ConfigError(f"environment variable AWS_CA_BUNDLE: {error}; correct or unset it") from error
    return options


def version_of(meta: Any) -> dict[str, str]:
    """What a conditional write needs to know of the version it is to replace."""
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n\nDebug")[0].strip().replace("\n", " ")


def _summary(error: Exception) -> str:
    """One line of what obstore says in many."""
    text, _, details = str(error).partition("\n\nDebug")
    text = text.strip().replace("\n", " ")
    code, message = (re.search(f"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message"))
    head, xml, _ = text.partition(": <")
    if xml:
        text = head + (f": {code[1]}" if code else "") + (f": {message[1]}" if message else "")
    for sign, meaning in (
        ("ConnectionRefused", "connection refused"),
        ("dns error", "host name not found"),
        ("kind: Timeout", "timed out"),
        ("ConnectionReset", "the connection was reset"),
        ("IncompleteMessage", "the connection ended without an answer"),
        ("IncompleteBody", "the connection ended within the answer"),
    ):
        if sign in details:
            return f"{text[:400]} ({meaning})"
    return text[:400]
