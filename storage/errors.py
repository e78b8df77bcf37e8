"""Every error this package raises on purpose, in one tree.

Each member also inherits the builtin a caller would already catch. Messages say where, what was
expected, what was found and what to do.

    TailcacheError
    ├── ConfigError      (ValueError)    a flag, field or file of settings is wrong
    ├── DataError        (ValueError)    a source document, row or token is unusable
    ├── TeacherError     (ValueError)    the teacher cannot be captured: NaN, infinity, wrong vocabulary
    ├── StudentError     (ValueError)    the student cannot be trained from this cache
    ├── MismatchError    (ValueError)    two things that must agree do not: corpora, tokenizers, settings
    ├── NotFoundError    (LookupError)   no cache, teacher, row or shard of that name
    ├── FormatError      (ValueError)    not a cache, or of a version this code does not know
    ├── IncompleteError  (RuntimeError)  a capture has not finished
    ├── CorruptError     (OSError)       stored bytes are not what was written
    └── StorageError     (OSError)       the disk is full, read-only or failing; a store does not answer
"""

__all__ = [
    "ConfigError",
    "CorruptError",
    "DataError",
    "FormatError",
    "IncompleteError",
    "MismatchError",
    "NotFoundError",
    "StorageError",
    "StudentError",
    "TailcacheError",
    "TeacherError",
]


class TailcacheError(Exception):
    """Anything this package raises on purpose."""


class ConfigError(TailcacheError, ValueError):
    """A flag, field or file of settings is wrong."""


class DataError(TailcacheError, ValueError):
    """A source document, row or token is unusable."""


class TeacherError(TailcacheError, ValueError):
    """The teacher cannot be captured: NaN or infinite logits, or a vocabulary that does not fit."""


class StudentError(TailcacheError, ValueError):
    """The student cannot be trained from this cache."""


class MismatchError(TailcacheError, ValueError):
    """Two things that must agree do not: corpora, tokenizers, or the settings of a resumed capture."""


class NotFoundError(TailcacheError, LookupError):
    """No cache, teacher, row or shard of that name."""


class FormatError(TailcacheError, ValueError):
    """Not a cache, or a cache of a format version this code does not know."""


class IncompleteError(TailcacheError, RuntimeError):
    """A capture has not finished."""


class CorruptError(TailcacheError, OSError):
    """Stored bytes are not what was written."""


class StorageError(TailcacheError, OSError):
    """The disk is full, read-only or failing, or a remote store does not answer or refuses."""
