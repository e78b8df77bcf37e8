"""Sealed records: one representation, and any other byte is noticed."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailcache.storage.errors import CorruptError
from tailcache.storage.sealed import canonical, seal, unseal

RECORDS: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.text(max_size=5).filter(lambda key: key != "sha256"),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@given(RECORDS)
def test_roundtrip(record: dict[str, Any]) -> None:
    data = seal(record)
    assert unseal(data, "x") == record
    assert seal(unseal(data, "x")) == data
    assert seal(dict(reversed(record.items()))) == data, "the order of keys does not matter"


@given(RECORDS, st.data())
def test_any_other_bytes_are_refused(record: dict[str, Any], data: st.DataObject) -> None:
    sealed = bytearray(seal(record))
    offset = data.draw(st.integers(0, len(sealed) - 1))
    sealed[offset] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptError, match=r"^manifest: "):
        unseal(bytes(sealed), "manifest")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"\n",
        lambda data: b" " + data,
        lambda data: data.replace(b": ", b":"),
        lambda data: b"",
        lambda data: b"[]\n",
        lambda data: b'{"a": 1}\n',
        lambda data: b'{"sha256": 5}\n',
        lambda data: b"\xff\xfe" + data,
        lambda data: b"[" * 100_000,
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: data.decode().encode("utf-16"),
        lambda data: data.replace(b'"a": 1', b'"a": 1,\n "a": 1'),
        lambda data: data.replace(b"1.5", b"1.50"),
        lambda data: data.replace(b"1.5", b"1e999"),
        lambda data: data.replace(b"\xc3\xa9", b"\\u00e9"),
        lambda data: data.replace(b"\xc3\xa9", b"\\ud800"),
    ],
)
def test_the_same_content_in_other_bytes_is_refused(change: Any) -> None:
    data = seal({"a": 1, "b": 1.5, "c": "é"})
    changed = change(data)
    assert changed != data
    with pytest.raises(CorruptError, match=r"^manifest: "):
        unseal(changed, "manifest")


def test_known_bytes() -> None:
    """The representation of docs/format.md, written out."""
    assert canonical({"b": [1, 2.5, []], "a": {"é": None, "x": {}}}) == (
        '{\n "a": {\n  "x": {},\n  "é": null\n },\n "b": [\n  1,\n  2.5,\n  []\n ]\n}\n'.encode()
    )


def test_what_cannot_be_sealed() -> None:
    with pytest.raises(ValueError, match="sha256"):
        seal({"sha256": "x"})
    with pytest.raises(ValueError, match="JSON compliant"):
        seal({"a": float("nan")})
