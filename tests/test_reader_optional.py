"""Optional fields: written, read only if asked for, whole, and damaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import flip, swap
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from places import cache_folder
from storage_fixtures import (
    Exact,
    bits_of,
    exact_logits,
    log_softmax,
    make_corpus,
    make_exact,
    make_head,
    make_hidden,
    speed_up,
)

from tailcache.storage import reader as reader_module
from tailcache.storage.codec import Targets
from tailcache.storage.direct_reads import Stretch
from tailcache.storage.errors import ConfigError, CorruptError, FormatError, TeacherError
from tailcache.storage.hidden import HeadKind, HiddenKind, HiddenLayout, finite_bfloat16, hidden_float32
from tailcache.storage.layout import Layout
from tailcache.storage.objects import read_objects
from tailcache.storage.place import Place
from tailcache.storage.reader import Teacher, open_cache
from tailcache.storage.targets import TargetsWriter, plan_layout
from tailcache.storage.verify import verify

BOTH = ("log_z_tail", "hidden")
KINDS: tuple[HiddenKind, ...] = ("bf16", "int8")
HEAD_KINDS: tuple[HeadKind, ...] = ("float32", "bfloat16", "float16")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    speed_up(monkeypatch)


def write(path: Path, **options: Any) -> Exact:
    exact = make_exact(
        make_corpus(path),
        **{"temperatures": (2.0, 4.0), "hidden": "int8", "shard_positions": 15, "chunk": 4, **options},
    )
    exact.write("t")
    return exact


@pytest.fixture
def exact(tmp_path: Path) -> Exact:
    return write(tmp_path)


@pytest.fixture(scope="module", params=KINDS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exact:
    """For tests that only read."""
    return write(tmp_path_factory.mktemp("cache"), hidden=request.param)


def opened(exact: Exact) -> Teacher:
    return open_cache(cache_folder(exact.corpus)).teacher("t")


def same(found: Targets, expected: Targets) -> None:
    for field in dataclasses.fields(Targets):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=field.name)


def test_what_was_written_is_read(shared: Exact) -> None:
    teacher = opened(shared)
    assert teacher.temperatures == (2.0, 4.0)
    assert shared.layout.hidden is not None
    assert (teacher.hidden_kind, teacher.hidden_width) == (shared.layout.hidden.kind, 16)
    assert teacher.optional == BOTH
    found = teacher.rows(0, shared.corpus.num_rows, optional=BOTH)
    np.testing.assert_allclose(found.log_z_tail, shared.targets.log_z_tail, rtol=2.0**-14)
    for name in ("hidden", "hidden_scale"):
        np.testing.assert_array_equal(getattr(found, name), getattr(shared.targets, name))
        assert getattr(found, name).dtype == getattr(shared.targets, name).dtype
    assert verify(cache_folder(shared.corpus)) == []


def test_what_is_not_asked_for_is_not_read_and_comes_back_empty(shared: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    original = read_objects

    def noting(place: Place, stretches: Sequence[Stretch]) -> list[NDArray[Any]]:
        read.update(stretch.spec.name for stretch in stretches)
        return original(place, stretches)

    monkeypatch.setattr(reader_module, "read_objects", noting)
    num, always = shared.corpus.num_targets, {*shared.layout.fields()} - {*BOTH, "hidden_scale"}
    extra = {"hidden_scale"} if shared.layout.hidden and shared.layout.hidden.kind == "int8" else set()
    for optional, more in (((), set()), (("log_z_tail",), {"log_z_tail"}), (["hidden"], {"hidden", *extra})):
        read.clear()
        targets = opened(shared).rows(0, shared.corpus.num_rows, optional=optional)
        assert read == always | more
        assert targets.log_z_tail.shape == (num, 2 if "log_z_tail" in optional else 0)
        assert targets.hidden.shape == (num, 16 if "hidden" in optional else 0)
        assert targets.hidden_scale.shape == (num,)
        if "hidden" not in optional:
            assert (targets.hidden_scale == 1).all()


def test_every_access_gives_the_same_values(shared: Exact) -> None:
    teacher, corpus = opened(shared), shared.corpus
    whole = teacher.rows(0, corpus.num_rows, optional=BOTH)
    offsets = corpus.target_offsets(0, corpus.num_rows)
    for row in range(corpus.num_rows):
        part = whole[int(offsets[row]) : int(offsets[row + 1])]
        same(teacher.row(row, optional=BOTH), part)
        same(teacher.rows(row, row + 1, optional=BOTH), part)
    same(teacher.rows(3, 3, optional=BOTH), whole[:0])
    chosen = np.random.default_rng(0).integers(0, corpus.num_targets, 50)
    same(teacher.positions(chosen, optional=BOTH), whole[chosen])
    same(teacher.positions(chosen[:0], optional=BOTH), whole[:0])
    count = 0
    for rows, targets in teacher.stream(seed=2, optional=BOTH):
        same(targets, teacher.row(int(rows.row_indices[0]), optional=BOTH))
        count += len(targets)
    assert count == corpus.num_targets


def test_optional_fields_that_are_not_there(exact: Exact, tmp_path: Path) -> None:
    plain = make_exact(exact.corpus)
    plain.write("plain")
    teacher = open_cache(tmp_path).teacher("plain")
    assert (teacher.temperatures, teacher.hidden_kind, teacher.hidden_width, teacher.optional) == ((), "none", 0, ())
    targets = teacher.rows(0, 5)
    assert targets.log_z_tail.shape == targets.hidden.shape == (len(targets), 0)
    assert targets.hidden_scale.tolist() == [1.0] * len(targets)
    for name, flag in (("log_z_tail", "--temperatures"), ("hidden", "--hidden")):
        with pytest.raises(ConfigError, match=f"'plain': expected the optional field {name}, found .* with {flag}"):
            teacher.positions(np.array([0]), optional=[name])
    with pytest.raises(ConfigError, match="expected optional fields among log_z_tail, hidden, found 'hiden'"):
        teacher.row(0, optional=["hiden"])
    with pytest.raises(ConfigError, match=r"expected a stored head, found none; capture .* --hidden"):
        teacher.head()


# -- hidden states and head ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_kind", HEAD_KINDS)
@pytest.mark.parametrize(("bias", "scale", "soft_cap"), [(True, 0.25, 30.0), (False, 1.0, None), (True, -2.0, None)])
def test_hidden_states_times_the_head_are_the_distributions(
    tmp_path: Path, kind: HiddenKind, head_kind: HeadKind, bias: bool, scale: float, soft_cap: float | None
) -> None:
    head = make_head(37, kind=head_kind, bias=bias, scale=scale, soft_cap=soft_cap)
    exact = write(tmp_path, hidden=kind, head=head)
    teacher = opened(exact)
    stored = teacher.head()
    assert (stored.weight_kind, stored.scale, stored.soft_cap) == (head_kind, scale, soft_cap)
    np.testing.assert_array_equal(stored.weight, head.weight)
    assert stored.weight.dtype == head.weight.dtype
    assert stored.weight.flags.writeable, "so that other libraries can take it without a copy"
    if bias:
        np.testing.assert_array_equal(stored.bias, head.bias)
    assert (stored.bias is None) == (not bias)
    targets = teacher.rows(0, exact.corpus.num_rows, optional=["hidden"])
    logits = stored.logits(hidden_float32(targets.hidden, targets.hidden_scale))
    np.testing.assert_allclose(log_softmax(logits.astype(np.float64)), exact.logprobs, atol=2e-5)
    assert verify(tmp_path) == []


def test_a_head_of_many_objects(tmp_path: Path) -> None:
    """A width at which an object holds few tokens; the last object is not full, and a chunk has a single token."""
    vocab_size, width = 130, 70_000
    corpus = make_corpus(tmp_path, vocab_size=vocab_size, lengths=(3, 2))
    head = make_head(vocab_size, width, "float16", bias=False, scale=0.003, soft_cap=None)
    exact = make_exact(corpus, hidden="int8", head=head, top_k=3)
    spec = exact.layout.constants()["head_weight"]
    assert (spec.chunk, spec.shard, spec.num_objects(vocab_size)) == (1, 64, 3)
    exact.write("t")
    np.testing.assert_array_equal(opened(exact).head().weight, head.weight)
    files = sorted(p.name for p in (tmp_path / "teachers/t/head_weight/c").iterdir())
    assert files == ["0", "1", "2"]
    assert set(opened(exact).manifest["files"]) >= {f"head_weight/c/{i}/0" for i in range(3)}
    assert verify(tmp_path) == []


@pytest.mark.parametrize("name", ["head_weight/c/0/0", "head_weight/zarr.json", "head_bias/c/0", "head_bias/zarr.json"])
@pytest.mark.parametrize("damage", ["gone", "flipped", "short"])
def test_a_damaged_head_is_named(exact: Exact, name: str, damage: str) -> None:
    path = cache_folder(exact.corpus) / "teachers" / "t" / name
    if damage == "gone":
        path.unlink()
    elif damage == "flipped":
        flip(path, 20)
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=name):
        opened(exact).head()
    opened(exact).rows(0, 5, optional=BOTH)  # what is asked for is whole
    assert f"teachers/t/{name}" in {fault.path for fault in verify(cache_folder(exact.corpus))}


@pytest.mark.parametrize("field", ["log_z_tail", "hidden", "hidden_scale"])
def test_damaged_optional_fields_are_named_by_who_reads_them(exact: Exact, field: str) -> None:
    folder = cache_folder(exact.corpus) / "teachers" / "t"
    spec = exact.layout.fields()[field]
    path, other = folder / spec.object_path(1), folder / spec.object_path(2)
    before = path.read_bytes()
    rows = exact.layout.shard_rows(1)
    for harm in ("gone", "flipped", "exchanged"):
        if harm == "gone":
            path.unlink()
        elif harm == "flipped":
            flip(path, 10)
        else:
            swap(path, other)
        teacher = opened(exact)
        teacher.rows(*rows)  # first without, so that what was checked then is not taken for all
        with pytest.raises(CorruptError, match=f"teacher 't', shard 1, field {field}"):
            teacher.rows(*rows, optional=BOTH)
        if harm == "exchanged":
            swap(path, other)
        path.write_bytes(before)
    opened(exact).rows(*rows, optional=BOTH)


# -- what verify makes of values -----------------------------------------------------------------------------------


def rewritten(tmp_path: Path, **options: Any) -> tuple[Exact, Path]:
    return make_exact(make_corpus(tmp_path), shard_positions=1000, **options), tmp_path


def write_changed(exact: Exact, **changes: NDArray[Any]) -> list[str]:
    """Problems of a cache whose records are sound and whose values are not."""
    targets, tail_sum = exact.shards[0]
    with TargetsWriter(exact.corpus, "t", layout=exact.layout, settings={}, head=exact.head) as writer:
        writer.write_shard(0, dataclasses.replace(targets, **changes), tail_sum)
        writer.finish()
    return [fault.problem for fault in verify(cache_folder(exact.corpus))]


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_of_other_positions_are_a_fault(tmp_path: Path, kind: HiddenKind) -> None:
    exact, _ = rewritten(tmp_path, hidden=kind)
    targets = exact.shards[0][0]
    (problem,) = write_changed(exact, hidden=np.roll(targets.hidden, 1, axis=0))
    assert "misaligned" in problem


def test_the_scale_of_hidden_states_is_checked(tmp_path: Path) -> None:
    exact, _ = rewritten(tmp_path, hidden="int8")
    targets = exact.shards[0][0]
    (problem,) = write_changed(exact, hidden=targets.hidden // 2)
    assert "the largest being 127" in problem


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values[:, ::-1],  # one temperature for the other
        lambda values: np.roll(values, 1, axis=0),
        lambda values: values + 3,
        lambda values: values - 3,
        lambda values: np.full_like(values, -np.inf),
    ],
    ids=["exchanged", "rolled", "high", "low", "none"],
)
def test_sums_that_cannot_be_are_a_fault(tmp_path: Path, change: Any) -> None:
    exact, _ = rewritten(tmp_path, temperatures=(2.0, 0.5))
    problems = write_changed(exact, log_z_tail=np.ascontiguousarray(change(exact.shards[0][0].log_z_tail)))
    assert any("log_z_tail at temperature" in problem for problem in problems)


@settings(max_examples=15, deadline=None)
@given(
    scale=st.floats(0.0, 200.0),
    top_k=st.integers(1, 37),
    seed=st.integers(0, 1000),
    temperatures=st.lists(
        st.floats(0.05, 200).filter(lambda tau: abs(tau - 1) > 1e-3), min_size=1, max_size=3, unique=True
    ),
)
def test_sound_sums_are_no_fault(
    tmp_path_factory: pytest.TempPathFactory, scale: float, top_k: int, seed: int, temperatures: list[float]
) -> None:
    path = tmp_path_factory.mktemp("cache")
    corpus = make_corpus(path)
    options: dict[str, Any] = {"temperatures": tuple(temperatures), "num_samples": 0, "shard_positions": 1000}
    make_exact(corpus, scale=scale, top_k=top_k, seed=seed, **options).write("t")
    assert verify(path) == []


# -- what is refused -----------------------------------------------------------------------------------------------


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    for kind in KINDS:
        exact, _ = rewritten(tmp_path / kind, hidden=kind, temperatures=(2.0,))
        targets, tail_sum = exact.shards[0]
        broken: list[dict[str, Any]] = [{"log_z_tail": np.full_like(targets.log_z_tail, np.nan)}]
        for scale in (np.nan, np.inf, -1.0):
            broken.append({"hidden_scale": np.full_like(targets.hidden_scale, scale)})
        if kind == "bf16":
            for value in (np.nan, np.inf, -np.inf):
                hidden = targets.hidden.copy()
                hidden[3, 2] = bits_of(np.array([value]))[0]
                broken.append({"hidden": hidden})
        with TargetsWriter(exact.corpus, "t", layout=exact.layout, settings={}, head=exact.head) as writer:
            for changes in broken:
                with pytest.raises(TeacherError, match=r"target \d+ of those to be stored"):
                    writer.write_shard(0, dataclasses.replace(targets, **changes), tail_sum)
            for missing in ({"log_z_tail": targets.log_z_tail[:, :0]}, {"hidden": targets.hidden[:, :-1]}):
                with pytest.raises(ValueError, match="expected fields and columns"):
                    writer.write_shard(0, dataclasses.replace(targets, **missing), tail_sum)
            assert writer.num_committed == 0


def test_a_head_and_a_layout_that_do_not_fit(tmp_path: Path) -> None:
    exact, _ = rewritten(tmp_path, hidden="bf16")
    plain = plan_layout(exact.corpus, top_k=5, num_samples=3, shard_positions=15)
    for layout, head in (
        (exact.layout, None),
        (plain, exact.head),
        (exact.layout, make_head(37, width=8)),
        (exact.layout, make_head(36)),
        (exact.layout, make_head(37, kind="float32")),
        (exact.layout, make_head(37, bias=False)),
        (exact.layout, make_head(37, soft_cap=None)),
    ):
        with pytest.raises(ValueError, match="expected a head as the layout has it"):
            TargetsWriter(exact.corpus, "t", layout=layout, settings={}, head=head)


def test_attributes_roundtrip_and_reject(exact: Exact) -> None:
    attributes = exact.layout.attributes()
    assert Layout.from_attributes(attributes, "x") == exact.layout
    hidden = attributes["hidden"]
    changes: tuple[dict[str, Any], ...] = (
        {"temperatures": 2.0}, {"temperatures": [1.0]}, {"temperatures": [0]}, {"temperatures": ["2"]},
        {"temperatures": [2.0, 2.0]}, {"temperatures": [True]}, {"temperatures": None},
        {"hidden": []}, {"hidden": "bf16"}, {"hidden": {}},
        {"hidden": {**hidden, "kind": "fp8"}}, {"hidden": {**hidden, "width": 0}}, {"hidden": {**hidden, "width": 2.0}},
        {"hidden": {**hidden, "head_kind": "uint16"}}, {"hidden": {**hidden, "head_bias": 1}},
        {"hidden": {**hidden, "logit_scale": "1"}}, {"hidden": {**hidden, "soft_cap": 0}},
        {"hidden": {**hidden, "soft_cap": -1.0}},
    )  # fmt: skip
    for changed in changes:
        with pytest.raises(FormatError, match=r"x: '(temperatures|hidden)'"):
            Layout.from_attributes({**attributes, **changed}, "x")
    later = {**attributes, "something_new": 3, "hidden": {**hidden, "also_new": 4}}
    assert Layout.from_attributes(later, "x") == exact.layout, "keys may be added within a version"


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=2, max_size=20))
def test_bits_of_bfloat16(values: list[float]) -> None:
    bits = bits_of(np.array([values]))
    numbers = hidden_float32(bits, np.ones(1, np.float32))
    np.testing.assert_array_equal(bits_of(numbers), bits)
    assert finite_bfloat16(bits).tolist() == [bool(np.isfinite(numbers).all())]


def test_targets_without_optional_fields_have_them_empty(exact: Exact) -> None:
    given_fields = {
        name: getattr(exact.targets, name)
        for name in vars(exact.targets)
        if not name.startswith(("log_z_tail", "hidden"))
    }
    for part in (slice(None), slice(0, 0), slice(2, 3)):
        targets = Targets(**{name: values[part] for name, values in given_fields.items()})
        num = len(targets)
        assert targets.log_z_tail.shape == targets.hidden.shape == (num, 0)
        assert targets.hidden_scale.tolist() == [1.0] * num
    both = Targets.concatenate([targets[:0], targets])
    assert len(both) == 1
    assert both.hidden.shape == (1, 0)
    assert make_hidden("int8", np.eye(3))["hidden"].max() == 127
    assert exact_logits(make_head(4, 3), make_hidden("bf16", np.eye(3))).shape == (3, 4)
    assert HiddenLayout.of("int8", make_head(4, 3)).width == 3
