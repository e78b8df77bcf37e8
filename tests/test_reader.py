"""Reading: any access gives the same values, damage is an error with a name, and nothing heavy is imported."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import flip, swap
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from places import cache_folder
from storage_fixtures import Exact, make_corpus, make_exact, speed_up

from tailcache.storage.codec import Targets
from tailcache.storage.errors import (
    CorruptError,
    FormatError,
    IncompleteError,
    MismatchError,
    NotFoundError,
    TailcacheError,
)
from tailcache.storage.reader import open_cache
from tailcache.storage.sealed import seal, unseal


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    speed_up(monkeypatch)


def write_cache(path: Path) -> Exact:
    exact = make_exact(make_corpus(path), shard_positions=15, chunk=4)
    exact.write("t")
    return exact


@pytest.fixture
def exact(tmp_path: Path) -> Exact:
    return write_cache(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Exact:
    """For tests that only read."""
    return write_cache(tmp_path_factory.mktemp("cache"))


def same(found: Targets, expected: Targets) -> None:
    for field in dataclasses.fields(Targets):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=field.name)


def everything(path: Path) -> list[NDArray[Any]]:
    """All that a cache with a teacher "t" gives, with new objects that have checked nothing yet."""
    cache = open_cache(path)
    corpus, teacher = cache.corpus, cache.teacher("t")
    rows = corpus.rows(0, corpus.num_rows)
    targets = teacher.rows(0, corpus.num_rows)
    return [
        *vars(rows).values(),
        *vars(targets).values(),
        teacher.mean_tail,
        corpus.token_counts,
        corpus.held_out_rows(),
        corpus.target_offsets(0, corpus.num_rows),
    ]


def test_every_access_gives_the_same_values(shared: Exact) -> None:
    teacher = open_cache(cache_folder(shared.corpus)).teacher("t")
    corpus = teacher.corpus
    whole = teacher.rows(0, corpus.num_rows)
    assert teacher.layout.num_shards > 2
    offsets = corpus.target_offsets(0, corpus.num_rows)
    for first in range(corpus.num_rows + 1):
        for last in range(first, corpus.num_rows + 1):
            same(teacher.rows(first, last), whole[int(offsets[first]) : int(offsets[last])])
    for row in range(corpus.num_rows):
        same(teacher.row(row), whole[int(offsets[row]) : int(offsets[row + 1])])
    same(teacher.positions(np.arange(corpus.num_targets)), whole)
    assert whole.token_ids.dtype == whole.tail_samples.dtype == np.int32
    assert whole.logprobs.dtype == whole.log_tail.dtype == np.float32


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_random_access_by_position(shared: Exact, data: st.DataObject) -> None:
    teacher = open_cache(cache_folder(shared.corpus)).teacher("t")
    whole = teacher.rows(0, teacher.corpus.num_rows)
    chosen = data.draw(st.lists(st.integers(0, teacher.num_targets - 1), max_size=40))
    same(teacher.positions(np.array(chosen, np.int64)), whole[np.array(chosen, np.int64)])


def test_values_are_those_written(shared: Exact) -> None:
    teacher = open_cache(cache_folder(shared.corpus)).teacher("t")
    assert (teacher.top_k, teacher.num_samples, teacher.vocab_size) == (5, 3, 37)
    assert teacher.num_targets == shared.corpus.num_targets == len(shared.targets)
    whole = teacher.rows(0, teacher.corpus.num_rows)
    assert (np.sort(whole.token_ids) == np.sort(shared.targets.token_ids)).all()
    assert (np.sort(whole.tail_samples) == np.sort(shared.targets.tail_samples)).all()
    for name in ("log_tail", "tail_entropy", "log_target", "log_not_target"):
        np.testing.assert_allclose(getattr(whole, name), getattr(shared.targets, name), atol=2.0**-10)
    np.testing.assert_allclose(whole.logprobs, shared.targets.logprobs, atol=0.13)


def test_outside_is_an_error(shared: Exact) -> None:
    cache = open_cache(cache_folder(shared.corpus))
    teacher = cache.teacher("t")
    num_rows = cache.corpus.num_rows
    for first, last in ((-1, 1), (0, num_rows + 1), (3, 2), (num_rows, num_rows + 1)):
        with pytest.raises(NotFoundError, match=r"expected rows within \[0, 10\)"):
            teacher.rows(first, last)
        with pytest.raises(NotFoundError, match="expected rows within"):
            cache.corpus.rows(first, last)
    for index in (-1, teacher.num_targets):
        with pytest.raises(NotFoundError, match="expected target positions within"):
            teacher.positions(np.array([0, index]))
    with pytest.raises(NotFoundError, match="expected a teacher named 'u', found t"):
        cache.teacher("u")
    with pytest.raises(NotFoundError, match="expected a cache with a folder 'corpus'"):
        open_cache(cache_folder(shared.corpus) / "corpus")
    assert isinstance(NotFoundError("x"), LookupError)


def order_of(exact: Exact, *, seed: int, epoch: int = 0) -> list[int]:
    teacher = open_cache(cache_folder(exact.corpus)).teacher("t")
    return [int(rows.row_indices[0]) for rows, _ in teacher.stream(seed=seed, epoch=epoch, window_blocks=2)]


def test_stream_visits_every_row_once(shared: Exact) -> None:
    teacher = open_cache(cache_folder(shared.corpus)).teacher("t")
    seen = []
    for rows, targets in teacher.stream(seed=3):
        assert len(rows) == 1
        row = int(rows.row_indices[0])
        seen.append(row)
        same(targets, teacher.row(row))
        alone = teacher.corpus.rows(row, row + 1)
        for name, values in vars(rows).items():
            np.testing.assert_array_equal(values, getattr(alone, name))
        assert len(targets) == rows.supervised.sum()
    assert sorted(seen) == list(range(teacher.corpus.num_rows))


def test_stream_is_decided_by_seed_and_epoch(shared: Exact) -> None:
    assert order_of(shared, seed=1) == order_of(shared, seed=1)
    orders = {tuple(order_of(shared, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(10)) for order in orders)


def test_stream_of_some_rows(shared: Exact) -> None:
    teacher = open_cache(cache_folder(shared.corpus)).teacher("t")
    for chosen in (teacher.corpus.train_rows(), teacher.corpus.held_out_rows(), np.array([7]), np.array([9, 0])):
        seen = [int(rows.row_indices[0]) for rows, _ in teacher.stream(seed=0, rows=chosen)]
        assert sorted(seen) == sorted(chosen.tolist())
    assert list(teacher.stream(seed=0, rows=np.array([], np.int64))) == []
    with pytest.raises(NotFoundError):
        list(teacher.stream(seed=0, rows=np.array([99])))


def test_a_stream_that_is_left_early_leaves_nothing_behind(shared: Exact) -> None:
    teacher = open_cache(cache_folder(shared.corpus)).teacher("t")
    for _ in range(3):
        stream = teacher.stream(seed=0)
        next(stream)
        del stream


def object_path(folder: Path, field: str, shard: int) -> Path:
    path = folder / field / "c" / str(shard)
    return path / "0" if path.is_dir() else path


Damage = Callable[[Path, str], object]
DAMAGES: dict[str, Damage] = {
    "gone": lambda folder, field: object_path(folder, field, 1).unlink(),
    "short": lambda folder, field: cut(object_path(folder, field, 1), slice(0, -1)),
    "beheaded": lambda folder, field: cut(object_path(folder, field, 1), slice(1, None)),
    "empty": lambda folder, field: cut(object_path(folder, field, 1), slice(0, 0)),
    "payload": lambda folder, field: flip(object_path(folder, field, 1), 20),
    "index": lambda folder, field: flip(object_path(folder, field, 1), -10),
    "checksum": lambda folder, field: flip(object_path(folder, field, 1), -1),
    "next": lambda folder, field: swap(object_path(folder, field, 1), object_path(folder, field, 2)),
    "previous": lambda folder, field: swap(object_path(folder, field, 1), object_path(folder, field, 0)),
}


def cut(path: Path, kept: slice) -> None:
    path.write_bytes(path.read_bytes()[kept])


@pytest.mark.parametrize("field", ["token_codes", "logprob_gaps", "tail_logit", "tail_sample_codes", "target_logit"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_objects_name_shard_and_field(exact: Exact, field: str, damage: str) -> None:
    path = cache_folder(exact.corpus)
    rows = exact.layout.shard_rows(1)
    others = [exact.layout.shard_rows(0), exact.layout.shard_rows(2)]
    good = [open_cache(path).teacher("t").rows(*other) for other in others]
    DAMAGES[damage](path / "teachers" / "t", field)
    with pytest.raises(CorruptError, match=f"teacher 't', shard 1, field {field}"):
        open_cache(path).teacher("t").rows(*rows)
    position = exact.corpus.target_offsets(rows[0], rows[0])
    with pytest.raises(CorruptError, match=f"shard 1, field {field}"):
        open_cache(path).teacher("t").positions(position)
    for shard, expected, other in zip((0, 2), good, others, strict=True):
        if damage == ("previous" if shard == 0 else "next"):
            with pytest.raises(CorruptError, match=f"shard {shard}, field {field}"):
                open_cache(path).teacher("t").rows(*other)
        else:
            same(open_cache(path).teacher("t").rows(*other), expected)


def test_objects_of_the_same_size_that_were_exchanged_are_noticed(tmp_path: Path) -> None:
    """Two shards with as many targets and incompressible values: sizes agree, zarr's own checksums agree too."""
    corpus = make_corpus(tmp_path, lengths=(9,) * 6, seed=3)
    exact = make_exact(corpus, shard_positions=1, chunk=2, top_k=1, num_samples=0)
    exact.write("t")
    folder = tmp_path / "teachers" / "t" / "target_logit" / "c"
    sizes: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        sizes.setdefault(path.stat().st_size, []).append(path)
    one, other = next(paths for paths in sizes.values() if len(paths) > 1)[:2]
    assert one.read_bytes() != other.read_bytes()
    swap(one, other)
    for path in (one, other):
        with pytest.raises(CorruptError, match=f"shard {path.name}, field target_logit"):
            open_cache(tmp_path).teacher("t").row(int(path.name))


def test_an_object_that_disappears_while_reading_is_never_zeros(exact: Exact) -> None:
    path = cache_folder(exact.corpus)
    teacher = open_cache(path).teacher("t")
    whole = teacher.rows(0, exact.corpus.num_rows)
    assert len(whole)
    (path / "teachers" / "t" / "tail_logit" / "c" / "1").unlink()
    with pytest.raises(CorruptError, match="shard 1, field tail_logit"):
        teacher.rows(0, exact.corpus.num_rows)
    (path / "corpus" / "tokens" / "c" / "0").unlink()
    with pytest.raises(CorruptError, match="tokens"):
        teacher.corpus.rows(0, 1)


@pytest.mark.slow
def test_no_flipped_byte_is_read_as_something_else(exact: Exact) -> None:
    """Flip a byte of any file: what is read is an error of ours that says where, or the very same values."""
    path = cache_folder(exact.corpus)
    good = everything(path)
    generator = np.random.default_rng(0)
    silent = set()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size):
        name = str(file.relative_to(path))
        data = file.read_bytes()
        for offset in {0, len(data) - 1, *generator.integers(0, len(data), 4).tolist()}:
            flip(file, offset, int(generator.integers(1, 256)))
            found, problem = outcome(path)
            if problem is None:
                silent.add(name)
                for a, b in zip(found, good, strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=f"{name} at {offset}")
            else:
                assert type(problem) is CorruptError, f"{name} at {offset}: {problem!r}"
                assert name.removeprefix("teachers/t/").removeprefix("corpus/").split("/")[0] in str(problem)
            file.write_bytes(data)
    # The reader has no use for these; `tailcache verify` reads them.
    copies = {"manifest_copy.json", "mean_tail_copy/zarr.json", "mean_tail_copy/c/0"}
    assert silent == {
        "corpus/zarr.json",
        "corpus/tokenizer/tokenizer.json",
        *(f"teachers/t/{name}" for name in ("zarr.json", *copies)),
    }


def outcome(path: Path) -> tuple[list[NDArray[Any]], TailcacheError | None]:
    try:
        return everything(path), None
    except TailcacheError as error:
        return [], error


@pytest.mark.parametrize(
    "name",
    [
        "teachers/t/manifest.json",
        "teachers/t/commits/00000001.json",
        "teachers/t/vocabulary_order/c/0",
        "teachers/t/vocabulary_order/zarr.json",
        "teachers/t/logprob_levels/c/0",
        "teachers/t/mean_tail/c/0",
        "teachers/t/mean_tail/zarr.json",
        "teachers/t/tail_logit/zarr.json",
        "corpus/manifest.json",
        "corpus/checksums.json",
        "corpus/tokens/zarr.json",
        "corpus/tokens/c/0",
        "corpus/supervised/c/0",
        "corpus/row_offsets/c/0",
        "corpus/target_offsets/c/0",
        "corpus/held_out/c/0",
        "corpus/token_counts/c/0",
    ],
)
def test_missing_files_are_named(exact: Exact, name: str) -> None:
    path = cache_folder(exact.corpus)
    (path / name).unlink()
    with pytest.raises(CorruptError) as caught:
        everything(path)
    assert name in str(caught.value)


def test_exchanged_records_and_arrays(exact: Exact, tmp_path: Path) -> None:
    path = cache_folder(exact.corpus)
    folder = path / "teachers" / "t"
    for one, other, message in (
        (folder / "commits/00000000.json", folder / "commits/00000001.json", "another shard"),
        (folder / "target_logit/c/0", folder / "tail_entropy/c/0", "shard 0, field tail_entropy"),
        (folder / "target_logit/zarr.json", folder / "tail_logit/zarr.json", "_logit/zarr.json: missing or not"),
        (path / "corpus/supervised/c/0", path / "corpus/document_start/c/0", "document_start/c/0"),
        (path / "corpus/row_offsets/c/0", path / "corpus/target_offsets/c/0", "row_offsets/c/0"),
    ):
        before = one.read_bytes()
        assert before != other.read_bytes()
        swap(one, other)
        with pytest.raises(CorruptError, match=message):
            everything(path)
        swap(one, other)
    # A corpus object cut down to its index says of itself that nothing is wrong.
    tokens = path / "corpus/tokens/c/0"
    before = tokens.read_bytes()
    tokens.write_bytes(before[-(16 * 64 + 4) :])
    with pytest.raises(CorruptError, match="tokens/c/0"):
        everything(path)
    tokens.write_bytes(before)
    everything(path)


def test_a_teacher_of_another_cache_is_refused(exact: Exact, tmp_path: Path) -> None:
    other = make_corpus(tmp_path / "other", seed=9)
    make_exact(other, shard_positions=15, chunk=4).write("t")
    shutil.copytree(cache_folder(exact.corpus) / "teachers" / "t", tmp_path / "other" / "teachers" / "u")
    with pytest.raises(MismatchError, match="captured over the corpus"):
        open_cache(tmp_path / "other").teacher("u")
    for name in ("complete.json", "commits/00000000.json"):
        target = tmp_path / "other" / "teachers" / "t" / name
        kept = target.read_bytes()
        shutil.copy(cache_folder(exact.corpus) / "teachers" / "t" / name, target)
        with pytest.raises(CorruptError, match=Path(name).name):
            open_cache(tmp_path / "other").teacher("t").row(0)
        target.write_bytes(kept)


def test_versions_and_formats(exact: Exact) -> None:
    path = cache_folder(exact.corpus)
    for name, where in (("corpus/manifest.json", ()), ("teachers/t/manifest.json", ("layout",))):
        record = unseal((path / name).read_bytes(), name)
        for key, value, message in (
            ("format_version", 9, r"expected format version 1( or 2)?, found 9; install the version"),
            ("format", "something", "expected .*found 'something'"),
        ):
            changed = json.loads(json.dumps(record))
            place = changed[where[0]] if where else changed
            place[key] = value
            (path / name).write_bytes(seal(changed))
            with pytest.raises(FormatError, match=message):
                open_cache(path).teacher("t")
        (path / name).write_bytes(seal(record))
    open_cache(path).teacher("t")


def test_unfinished_teachers(exact: Exact) -> None:
    path = cache_folder(exact.corpus)
    folder = path / "teachers" / "t"
    (folder / "complete.json").unlink()
    with pytest.raises(IncompleteError, match="run the same `tailcache capture` again"):
        open_cache(path).teacher("t")
    assert open_cache(path).teacher_names == ["t"]
    for commit in (folder / "commits").iterdir():
        commit.unlink()
    (folder / "manifest.json").unlink()
    with pytest.raises(IncompleteError, match="stopped before the first shard"):
        open_cache(path).teacher("t")
    assert open_cache(path).teacher_names == []


def test_a_cache_without_teachers(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    cache = open_cache(str(tmp_path))
    assert cache.teacher_names == []
    with pytest.raises(NotFoundError, match="found none"):
        cache.teacher("t")


def test_reading_imports_nothing_heavy() -> None:
    code = (
        "import sys, tailcache.storage.reader, tailcache.storage.verify, tailcache.storage.targets;"
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'pyarrow', 'tyro', 'matplotlib'};"
        "sys.exit(repr(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
