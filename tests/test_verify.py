"""Verify finds every flipped, missing, exchanged and added byte, and nothing in a good cache."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from faults import Killed, flip, killed_at, swap
from places import cache_folder
from storage_fixtures import Exact, corpus_next, make_corpus, make_exact, speed_up, tree

from tailcache.scripts import cli
from tailcache.storage.errors import NotFoundError
from tailcache.storage.sealed import seal, unseal
from tailcache.storage.verify import Fault, inspect, verify


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    speed_up(monkeypatch)


@pytest.fixture
def exact(tmp_path: Path) -> Exact:
    """With every field there is, so that a byte of each kind is flipped."""
    exact = make_exact(make_corpus(tmp_path), shard_positions=25, chunk=8, temperatures=(2.0,), hidden="int8")
    exact.write("t")
    return exact


def names(faults: list[Fault]) -> set[str]:
    return {fault.path for fault in faults}


@pytest.mark.parametrize(
    ("vocab_size", "top_k", "num_samples", "scale"),
    [(37, 5, 3, 3.0), (37, 37, 0, 3.0), (37, 1, 0, 0.0), (37, 1, 2, 100.0), (37, 20, 2, 3000.0), (70_000, 6, 4, 2.0)],
)
def test_good_caches_have_no_faults(
    tmp_path: Path, vocab_size: int, top_k: int, num_samples: int, scale: float
) -> None:
    corpus = make_corpus(tmp_path, vocab_size=vocab_size)
    assert verify(tmp_path) == []
    for seed in range(3):
        make_exact(corpus, top_k=top_k, num_samples=num_samples, scale=scale, seed=seed).write(f"t{seed}")
    read = 0

    def progress(num: int) -> None:
        nonlocal read
        read += num

    assert verify(tmp_path, progress=progress) == []
    assert read >= sum(len(data) for data in tree(tmp_path).values())


def test_log_probs_of_minus_thousands_of_nats_are_no_faults(tmp_path: Path) -> None:
    """Far below 64 nats the levels are nats apart: a target just outside the top K may look likelier than its end."""
    corpus = make_corpus(tmp_path, vocab_size=4000, lengths=(60, 60))
    generator = np.random.default_rng(0)
    logits = np.stack([generator.permutation(np.arange(4000.0)) for _ in range(corpus.num_targets)]) * -2.0
    position, next_token = np.arange(corpus.num_targets), corpus_next(corpus)
    first_outside = np.argmin(np.abs(logits + 4000.0), axis=1)
    logits[position, first_outside] = logits[position, next_token]
    logits[position, next_token] = -4000.0
    logits *= generator.uniform(1.0, 1.3, (corpus.num_targets, 1))
    make_exact(corpus, top_k=2000, num_samples=0, logits_TV=logits, shard_positions=200).write("t")
    assert verify(tmp_path) == []


def sampled_offsets(name: str, size: int) -> list[int]:
    """Every byte of small records would take minutes: every n-th, and all of the ends."""
    step = max(1, size // (8 if name.endswith(".json") else 4))
    return sorted({0, *range(2, size, step), size - 2, size - 1} & set(range(size)))


@pytest.mark.slow
def test_flipped_bytes_of_every_file_are_found(exact: Exact) -> None:
    root = cache_folder(exact.corpus)
    generator = np.random.default_rng(0)
    flips = 0
    for name, data in tree(root).items():
        for offset in sampled_offsets(name, len(data)):
            flip(root / name, offset, int(generator.integers(1, 256)))
            assert name in names(verify(root)), f"{name}, byte {offset} of {len(data)}"
            flips += 1
            (root / name).write_bytes(data)
    assert flips > 250
    assert verify(root) == []


@pytest.mark.slow
def test_every_single_byte_of_some_files(exact: Exact) -> None:
    root = cache_folder(exact.corpus)
    for name, step in (("teachers/t/tail_logit/c/1", 1), ("teachers/t/complete.json", 4)):
        data = (root / name).read_bytes()
        for offset in range(0, len(data), step):
            flip(root / name, offset, 1 << (offset % 8))
            assert name in names(verify(root)), f"{name}, byte {offset} of {len(data)}"
            (root / name).write_bytes(data)


@pytest.mark.slow
def test_deleted_shortened_and_grown_files_are_found(exact: Exact) -> None:
    root = cache_folder(exact.corpus)
    for name, data in tree(root).items():
        if name.endswith(".lock"):
            continue
        (root / name).unlink()
        found = names(verify(root))
        if name.endswith("complete.json"):  # then it is a capture that has lost its running sum
            assert any("partial/" in path for path in found)
        else:
            assert name in found, f"{name} deleted"
        for changed in (data[:-1], data[1:], data + b"\0", b""):
            (root / name).write_bytes(changed)
            assert name in names(verify(root)), f"{name} of {len(data)} bytes changed to {len(changed)}"
        (root / name).write_bytes(data)
    assert verify(root) == []


def test_added_files_are_found(exact: Exact) -> None:
    root = cache_folder(exact.corpus)
    for name in (
        "note.txt",
        "corpus/extra",
        "corpus/tokens/c/1",
        "teachers/t/tail_logit/c/99",
        "teachers/t/commits/00000099.json",
        "teachers/stray",
    ):
        (root / name).write_bytes(b"x")
        assert names(verify(root)) == {name}
        (root / name).unlink()
    (root / "teachers" / "t.lock").write_bytes(b"x")
    assert names(verify(root)) == {"teachers/t.lock"}


def test_exchanged_files_are_found_with_shard_and_field(exact: Exact) -> None:
    root = cache_folder(exact.corpus)
    folder = root / "teachers" / "t"
    pairs = [
        (folder / field / "c" / "0", folder / field / "c" / "1")
        for field in ("tail_logit", "target_logit", "tail_entropy")
    ]
    pairs += [(folder / field / "c/0/0", folder / field / "c/1/0") for field in ("token_codes", "logprob_gaps")]
    for one, other in pairs:
        swap(one, other)
        faults = verify(root)
        field = one.relative_to(folder).parts[0]
        found = {(fault.path, fault.shard, fault.field) for fault in faults}
        for path, shard in ((one, 0), (other, 1)):
            assert (str(path.relative_to(root)), shard, field) in found
        assert f"shard 0, field {field}" in "\n".join(str(fault) for fault in faults)
        swap(one, other)
    commits = folder / "commits"
    swap(commits / "00000000.json", commits / "00000001.json")
    assert {"teachers/t/commits/00000000.json", "teachers/t/commits/00000001.json"} <= names(verify(root))


def test_all_faults_are_listed(exact: Exact) -> None:
    root = cache_folder(exact.corpus)
    damaged = [
        "corpus/tokens/c/0",
        "teachers/t/tail_logit/c/1",
        "teachers/t/commits/00000000.json",
        "teachers/t/zarr.json",
    ]
    for name in damaged:
        flip(root / name, 30)
    assert names(verify(root)) >= set(damaged)


def test_values_that_contradict_each_other_are_found(tmp_path: Path) -> None:
    """Every checksum is right, but the targets are those of another alignment: one position late."""
    corpus = make_corpus(tmp_path, lengths=(60, 60))
    exact = make_exact(corpus, scale=4.0)
    order = np.roll(np.arange(corpus.num_targets), 1)
    shards = []
    offset = 0
    for targets, tail_sum in exact.shards:
        part = np.arange(offset, offset + len(targets))
        late = exact.targets[order[part]]
        shards.append((late, tail_sum))
        offset += len(targets)
    type(exact)(exact.corpus, exact.layout, exact.logprobs, exact.targets, shards).write("late")
    faults = verify(tmp_path)
    assert faults
    assert any("misaligned" in fault.problem for fault in faults)


def test_a_corpus_whose_records_were_rewritten(exact: Exact) -> None:
    """Consistent seals over other content: the content hash tells."""
    root = cache_folder(exact.corpus)
    path = root / "corpus" / "manifest.json"
    record = unseal(path.read_bytes(), "manifest")
    record["content"]["tokens"] = "0" * 64
    path.write_bytes(seal(record))
    assert any("content hash of tokens" in fault.problem for fault in verify(root))


def test_unfinished_captures(tmp_path: Path) -> None:
    """Killed anywhere: no fault as long as what is committed is whole; damage in a committed shard is a fault."""
    exact = make_exact(make_corpus(tmp_path), shard_positions=25)
    with killed_at(-1, "after") as counter:
        exact.write("t")
    shutil.rmtree(tmp_path / "teachers" / "t")
    damaged = 0
    for number in [*range(0, counter.count - 4, 2), *range(counter.count - 4, counter.count)]:
        with pytest.raises(Killed), killed_at(number, "half"):
            exact.write("t")
        assert verify(tmp_path) == [], counter.names[number]
        if (tmp_path / "teachers/t/commits/00000000.json").exists():
            flip(tmp_path / "teachers/t/tail_logit/c/0", 9)
            assert names(verify(tmp_path)) == {"teachers/t/tail_logit/c/0"}
            damaged += 1
        shutil.rmtree(tmp_path / "teachers" / "t", ignore_errors=True)
    assert damaged > 5


def test_no_cache_at_all(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="expected a cache with a folder 'corpus'"):
        verify(tmp_path)


def test_a_fast_verification_reads_records_and_sizes(exact: Exact) -> None:
    root = cache_folder(exact.corpus)
    found, whole = inspect(root, level="fast"), inspect(root)
    assert found.faults == whole.faults == []
    assert (found.files, found.bytes) == (whole.files, whole.bytes) == (len(tree(root)), whole.bytes)
    records = sum(len(data) for name, data in tree(root).items() if name.endswith(".json"))
    assert found.bytes_read <= 2 * records < found.bytes
    assert whole.bytes_read >= whole.bytes
    assert not whole.report()["faults"]


@pytest.mark.slow
def test_what_a_fast_verification_finds(exact: Exact) -> None:
    """Every file that is gone or of another size, and every changed record or zarr.json; no flipped byte elsewhere."""
    root = cache_folder(exact.corpus)
    for name, data in tree(root).items():
        (root / name).unlink()
        found = names(verify(root, level="fast"))
        assert name in found or name.endswith("complete.json"), f"{name} deleted"
        if "teachers/" in name and "/c/" in name and name.split("/")[2] not in exact.layout.constants():
            (root / name).write_bytes(data + b"x")
            assert name in names(verify(root, level="fast")), f"{name} grown"
        (root / name).write_bytes(b"")
        assert name in names(verify(root, level="fast")), f"{name} emptied"
        (root / name).write_bytes(data)
        flip(root / name, len(data) // 2, 1)
        assert (name in names(verify(root, level="fast"))) == name.endswith(".json") or "tokenizer" in name
        (root / name).write_bytes(data)
    assert verify(root, level="fast") == []


def test_the_report_names_path_shard_field_and_remedy(exact: Exact, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = cache_folder(exact.corpus)
    flip(root / "teachers/t/tail_logit/c/1", 30)
    (root / "note").write_bytes(b"x")
    (root / "quarantine/teachers/t").mkdir(parents=True)
    (root / "quarantine/teachers/t/anything").write_bytes(b"put aside")
    out = tmp_path_factory.mktemp("out") / "report.json"
    assert cli.main(["verify", "--cache", str(root), "--json", str(out)]) == 1
    report = json.loads(out.read_text())
    assert (report["format"], report["format_version"]) == ("tailcache verification", 1)
    assert (report["level"], report["good"], report["counts"]["faults"]) == ("full", False, 2)
    assert report["counts"]["shards"] == exact.layout.num_shards
    assert report["counts"]["positions"] == exact.corpus.num_targets
    (teacher,) = report["teachers"]
    assert teacher == {
        "name": "t", "complete": True, "shards": exact.layout.num_shards, "committed": exact.layout.num_shards,
        "positions": exact.corpus.num_targets,
    }  # fmt: skip
    damaged, stray = report["faults"]
    assert (damaged["path"], damaged["teacher"]) == ("teachers/t/tail_logit/c/1", "t")
    assert (damaged["shard"], damaged["field"]) == (1, "tail_logit")
    assert "checksum" in damaged["problem"]
    assert "verify --repair --teacher" in damaged["remedy"]
    assert (stray["path"], stray["teacher"]) == ("note", None)
    assert "quarantine" in stray["remedy"]
    assert cli.main(["verify", "--cache", str(root), "--level", "fast", "--json", str(out)]) == 1
    report = json.loads(out.read_text())
    assert [fault["path"] for fault in report["faults"]] == ["note"]
    (root / "note").unlink()
    assert cli.main(["verify", "--cache", str(root), "--level", "fast", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["good"]
    assert cli.main(["verify", "--cache", str(root), "--level", "slow"]) == 2


def test_a_damaged_manifest_hides_no_other_damage(exact: Exact) -> None:
    """Its copy says what all else should be."""
    root = cache_folder(exact.corpus)
    folder = root / "teachers/t"
    flip(folder / "target_logit/c/0", 9)
    for name in ("manifest.json", "manifest_copy.json"):
        data = (folder / name).read_bytes()
        for damage in (data[:-2], data.replace(b"a", b"b", 1), b"", None):
            if damage is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(damage)
            assert names(verify(root)) == {f"teachers/t/{name}", "teachers/t/target_logit/c/0"}
            (folder / name).write_bytes(data)
