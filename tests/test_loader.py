"""The loader: every row once per epoch, whatever the processes, the workers, and where it is resumed."""

import json
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from storage_fixtures import make_corpus, make_exact
from torch.utils.data import DataLoader

from tailcache.storage.blocks import TargetRows
from tailcache.storage.codec import Targets
from tailcache.storage.compiled import SWITCH
from tailcache.storage.errors import ConfigError, CorruptError, MismatchError
from tailcache.storage.reader import Teacher, open_cache
from tailcache.trainers.loader import CacheLoader, as_tensors

LENGTHS = tuple(2 + i * 7 % 11 for i in range(61))
SMALL: dict[str, Any] = {"block_rows": 3, "window_blocks": 4}
WORLDS = (1, 2, 3, 8)
pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than this machine has cores


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp("loader")
    make_exact(make_corpus(folder, lengths=LENGTHS), shard_positions=60, chunk=8).write("t")
    return open_cache(folder).teacher("t")


def loader_of(teacher: Teacher, **settings: Any) -> CacheLoader:
    return CacheLoader(teacher, **{"batch_rows": 2, "rank": 0, "world_size": 1, **SMALL, **settings})


def rows_in(batches: Any) -> list[int]:
    return [row for batch in batches for row in batch["row_indices"].tolist() if row >= 0]


def train_rows(teacher: Teacher) -> list[int]:
    rows: list[int] = teacher.corpus.train_rows().tolist()
    return rows


def run_of(teacher: Teacher, world_size: int, steps: int | None, state: Any = None, **settings: Any) -> Any:
    """All processes of a run, one after another: the rows they saw, and where they say they are then."""
    seen, states = [], []
    for rank in range(world_size):
        loader = loader_of(teacher, rank=rank, world_size=world_size, **settings)
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        seen += rows_in(islice(loader, steps))
        states.append(loader.state_dict())
    assert all(each == states[0] for each in states)
    return seen, states[0]


# ---- what is in a batch ----


@pytest.mark.parametrize(("batch_rows", "block_rows"), [(2, 3), (1, 12), (12, 3)])
def test_a_batch_holds_its_rows_and_their_targets(teacher: Teacher, batch_rows: int, block_rows: int) -> None:
    for batch in loader_of(teacher, seed=3, batch_rows=batch_rows, block_rows=block_rows):
        assert len(batch["row_indices"]) <= batch_rows
        offsets, into = batch["offsets"].tolist(), batch["target_offsets"].tolist()
        for i, row in enumerate(batch["row_indices"].tolist()):
            stored, targets = teacher.corpus.rows(row, row + 1), teacher.row(row)
            for name in ("tokens", "document_start", "supervised"):
                assert (batch[name][offsets[i] : offsets[i + 1]].numpy() == getattr(stored, name)).all()
            for name in ("token_ids", "logprobs", "log_tail", "tail_entropy", "tail_samples", "log_target"):
                assert (batch[name][into[i] : into[i + 1]].numpy() == getattr(targets, name)).all()
        assert offsets[-1] == len(batch["tokens"])
        assert into[-1] == len(batch["log_tail"]) == int(batch["supervised"].sum())
        assert not {"log_z_tail", "hidden", "hidden_scale", "held_out"} & set(batch)


def test_small_batches_are_decoded_several_at_a_time(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = Teacher.decode

    def counted(self: Teacher, stored: Any, rows: Any = None) -> Targets:
        decoded.append(len(rows))
        return decode(self, stored, rows)

    monkeypatch.setattr(Teacher, "decode", counted)
    loader = loader_of(teacher, batch_rows=2, block_rows=6)
    sizes = [len(batch["row_indices"]) for batch in loader]
    assert sum(decoded) == sum(sizes) == loader.num_rows
    assert max(decoded) == 6  # about a block's
    assert len(decoded) < len(sizes) / 2


@pytest.mark.parametrize("switch", ["never", "always"])
def test_rows_are_the_same_whichever_way_they_are_copied(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    if switch == "always":
        pytest.importorskip("numba")
    expected = list(loader_of(teacher, batch_rows=7))
    monkeypatch.setenv(SWITCH, switch)
    for batch, other in zip(loader_of(teacher, batch_rows=7), expected, strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in other)


def test_optional_fields_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    make_exact(make_corpus(tmp_path), temperatures=(2.0, 0.5), hidden="int8").write("t")
    teacher = open_cache(tmp_path).teacher("t")
    (batch,) = loader_of(teacher, batch_rows=20, optional=("log_z_tail", "hidden"))
    stored = [teacher.row(row, optional=("log_z_tail", "hidden")) for row in batch["row_indices"].tolist()]
    for name in ("log_z_tail", "hidden", "hidden_scale"):
        assert (batch[name].numpy() == np.concatenate([getattr(each, name) for each in stored])).all()
    with pytest.raises(ConfigError, match="expected optional fields among"):
        list(loader_of(teacher, optional=("nothing",)))


def test_held_out_rows_never_appear(teacher: Teacher) -> None:
    held_out = teacher.corpus.held_out_rows().tolist()
    assert sorted(rows_in(loader_of(teacher))) == train_rows(teacher)
    assert sorted(rows_in(loader_of(teacher, split="held-out"))) == held_out
    assert sorted(rows_in(loader_of(teacher, rows=np.array([4, 0, 60, 0])))) == [0, 4, 60]
    with pytest.raises(ConfigError, match=f"of the train split, found 2 that are not, first {held_out[0]}"):
        loader_of(teacher, rows=np.array([0, *held_out[:2]]))


def test_numbers_that_make_no_sense_are_refused(teacher: Teacher) -> None:
    for wrong in ({"batch_rows": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"window_blocks": 0}):
        with pytest.raises(ConfigError, match="expected batch_rows and window_blocks of at least 1"):
            loader_of(teacher, **wrong)


def test_no_rows_no_batches(teacher: Teacher) -> None:
    loader = loader_of(teacher, rows=np.array([], np.int64))
    assert (len(loader), list(loader)) == (0, [])


# ---- the order ----


def test_epochs_differ_and_a_seed_decides_them(teacher: Teacher) -> None:
    loader = loader_of(teacher, seed=5)
    orders = [rows_in(loader) for _ in range(3)]
    assert [sorted(order) for order in orders] == [train_rows(teacher)] * 3
    assert len({tuple(order) for order in orders}) == 3
    loader.set_epoch(1)
    assert rows_in(loader) == orders[1]
    assert rows_in(loader_of(teacher, seed=5)) == orders[0] != rows_in(loader_of(teacher, seed=6))


@pytest.mark.parametrize("order_version", [1, 2])
def test_a_global_batch_has_the_same_rows_on_any_number_of_processes(teacher: Teacher, order_version: int) -> None:
    def batches(world_size: int, batch_rows: int) -> list[list[int]]:
        loaders = [
            loader_of(teacher, rank=rank, world_size=world_size, batch_rows=batch_rows, order_version=order_version)
            for rank in range(world_size)
        ]
        return [sorted(rows_in(together)) for together in zip(*loaders, strict=True)]

    expected = batches(1, 12)
    for world_size, batch_rows in ((2, 6), (3, 4), (4, 3), (12, 1)):
        assert batches(world_size, batch_rows) == expected


@pytest.mark.parametrize("before", WORLDS)
@pytest.mark.parametrize("after", WORLDS)
def test_a_run_goes_on_with_any_number_of_processes(teacher: Teacher, before: int, after: int) -> None:
    """Stopped in the middle, and once more in the middle of the rest; also with another batch size."""
    seen, state = run_of(teacher, before, 2, batch_rows=1)
    more, state = run_of(teacher, after, 1, state, batch_rows=2)
    rest, end = run_of(teacher, before, None, state, batch_rows=3)
    assert sorted(seen + more + rest) == train_rows(teacher)
    assert (end["epoch"], end["rows_taken"]) == (1, 0)


def test_a_state_after_every_step_of_an_epoch_leaves_exactly_the_rest(teacher: Teacher) -> None:
    loader = loader_of(teacher)
    whole = rows_in(loader_of(teacher))
    seen: list[int] = []
    for batch in loader:
        seen += rows_in([batch])
        other = loader_of(teacher)
        other.load_state_dict(loader.state_dict())
        rest = rows_in(other) if len(seen) < len(whole) else []
        assert seen + rest == whole


def test_resuming_does_not_change_the_epochs_that_follow(teacher: Teacher) -> None:
    loader, other = loader_of(teacher), loader_of(teacher)
    next(iter(loader))
    other.load_state_dict(loader.state_dict())
    list(other)
    assert (other.epoch, other.state_dict()["rows_taken"]) == (1, 0)
    expected = loader_of(teacher)
    expected.set_epoch(1)
    assert rows_in(other) == rows_in(expected)


def test_leaving_an_epoch_early_begins_it_again(teacher: Teacher) -> None:
    loader = loader_of(teacher)
    first = next(iter(loader))
    assert loader.state_dict()["rows_taken"] == 2
    assert rows_in(islice(loader, 1)) == rows_in([first])


def test_a_state_of_another_order_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    state = loader_of(teacher).state_dict()
    with pytest.raises(MismatchError, match="seed: the state has 0, this loader 1"):
        loader_of(teacher, seed=1).load_state_dict(state)
    with pytest.raises(MismatchError, match="block_rows: the state has 3, this loader 4"):
        loader_of(teacher, block_rows=4).load_state_dict(state)
    with pytest.raises(MismatchError, match=r"num_rows: .*rows: "):
        loader_of(teacher, rows=np.arange(3)).load_state_dict(state)
    make_exact(make_corpus(tmp_path, lengths=LENGTHS, seed=4)).write("t")
    with pytest.raises(MismatchError, match="corpus_hash: "):
        loader_of(open_cache(tmp_path).teacher("t")).load_state_dict(state)
    for taken in (-1, 1000, "many", None):
        with pytest.raises(MismatchError, match="rows_taken: expected a number from 0 to"):
            loader_of(teacher).load_state_dict({**state, "rows_taken": taken})
    with pytest.raises(MismatchError, match="version: the state has 9"):
        loader_of(teacher).load_state_dict({**state, "version": 9})


# ---- the last step ----


@pytest.mark.parametrize("ends", ["even", "short", "drop"])
@pytest.mark.parametrize("num_rows", [12, 13, 15, 17])
def test_the_last_step(teacher: Teacher, ends: Any, num_rows: int) -> None:
    rows = teacher.corpus.train_rows()[:num_rows]
    lengths, seen = [], []
    for rank in range(3):
        loader = loader_of(teacher, rank=rank, world_size=3, rows=rows, ends=ends)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert loader.epoch == 1
        lengths.append(len(batches))
        seen += rows_in(batches)
        for batch in batches:
            for i, row in enumerate(batch["row_indices"].tolist()):
                if row < 0:  # tokens for the model to run on, and nothing to be learnt from them
                    assert batch["offsets"][i + 1] > batch["offsets"][i]
                    assert not batch["supervised"].any()
                    assert len(batch["log_tail"]) == 0
    full, rest = divmod(num_rows, 6)
    assert sorted(seen) == (sorted(set(seen)) if ends == "drop" else rows.tolist())
    assert num_rows - len(seen) == (rest if ends == "drop" else 0)
    if ends == "short":
        assert sum(lengths) == 3 * full + min(rest, 3)
    else:
        assert set(lengths) == {full + (ends == "even" and rest > 0)}


def test_short_ends_do_not_end_the_epoch_for_the_others(teacher: Teacher) -> None:
    """A process that has no further step is not where the epoch's last row has been taken."""
    rows = teacher.corpus.train_rows()[:7]
    loader = loader_of(teacher, rank=0, world_size=3, rows=rows, ends="short")
    next(iter(loader))
    assert (loader.state_dict()["epoch"], loader.state_dict()["rows_taken"]) == (0, 6)


# ---- workers ----


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_change_nothing(teacher: Teacher, num_workers: int) -> None:
    plain, other = loader_of(teacher), loader_of(teacher, num_workers=num_workers, prefetch_factor=1)
    for a, b in zip(plain, other, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (4, 1), (2, 0)])
def test_a_run_goes_on_with_any_number_of_workers(teacher: Teacher, before: int, after: int) -> None:
    seen, state = run_of(teacher, 2, 3, num_workers=before)
    rest, _ = run_of(teacher, 3, None, state, num_workers=after)
    assert sorted(seen + rest) == train_rows(teacher)


def test_workers_that_persist_follow_epochs_and_states(teacher: Teacher) -> None:
    plain = loader_of(teacher)
    loader = loader_of(teacher, num_workers=2, persistent_workers=True)
    assert rows_in(loader) == rows_in(plain)
    assert rows_in(loader) == rows_in(plain)
    first = next(iter(loader))  # an epoch that is left early
    plain.set_epoch(2)
    assert rows_in([first]) == rows_in(islice(plain, 1))
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "rows_taken": 6})
    assert rows_in(loader) == rows_in(loader_of(teacher))[6:]
    plain.set_epoch(1)
    loader.close()
    assert rows_in(loader) == rows_in(plain)
    loader.close()


def test_memory_of_workers_is_used_again_in_epochs_that_are_left_early(teacher: Teacher) -> None:
    loader = loader_of(teacher, num_workers=2, persistent_workers=True)
    plain = loader_of(teacher)
    list(loader)
    used = len(loader._unpacker._pieces)
    for epoch in range(1, 7):
        plain.set_epoch(epoch)
        loader.set_epoch(epoch)
        assert rows_in(islice(loader, epoch % 4 + 1)) == rows_in(islice(plain, epoch % 4 + 1))
    loader.set_epoch(7)
    plain.set_epoch(7)
    assert rows_in(loader) == rows_in(plain)
    assert len(loader._unpacker._pieces) <= 2 * used
    loader.close()


@pytest.mark.slow
def test_workers_that_are_spawned(teacher: Teacher) -> None:
    loader = loader_of(teacher, num_workers=2, multiprocessing_context="spawn", persistent_workers=True)
    plain = loader_of(teacher)
    assert rows_in(loader) == rows_in(plain)
    loader.load_state_dict({**loader.state_dict(), "rows_taken": 8})
    plain.load_state_dict({**plain.state_dict(), "rows_taken": 8})
    assert rows_in(loader) == rows_in(plain)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_is_an_error_of_the_consumer(tmp_path: Path, num_workers: int) -> None:
    make_exact(make_corpus(tmp_path, lengths=LENGTHS), shard_positions=60, chunk=8).write("t")
    teacher = open_cache(tmp_path).teacher("t")
    (tmp_path / "teachers" / "t" / "tail_logit" / "c" / "2").unlink()
    with pytest.raises(CorruptError, match="shard 2, field tail_logit"):
        list(loader_of(teacher, num_workers=num_workers))


def test_what_comes_before_damage_is_handed_over_first(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is not made yet when the damage is found."""

    def slow(rows: TargetRows) -> dict[str, torch.Tensor]:
        time.sleep(0.1)
        return as_tensors(rows)

    monkeypatch.setattr("tailcache.trainers.loader.num_processors", lambda: 1)
    loader = loader_of(teacher, collate=slow)
    expected = rows_in(loader_of(teacher))
    read, num_reads = loader._blocks.read, 0

    def damaged(visit: int) -> Any:
        nonlocal num_reads
        num_reads += 1
        if num_reads > 4:
            raise CorruptError("damaged")
        return read(visit)

    monkeypatch.setattr(loader._blocks, "read", damaged)
    found: list[int] = []
    with pytest.raises(CorruptError, match="damaged"):
        found.extend(row for batch in loader for row in rows_in([batch]))
    assert found == expected[: len(found)]
    assert found


def test_an_error_of_the_collation_is_an_error_of_the_consumer(teacher: Teacher) -> None:
    def refuse(rows: TargetRows) -> Any:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        next(iter(loader_of(teacher, collate=refuse)))


def test_an_iteration_that_is_left_leaves_no_thread_behind(teacher: Teacher) -> None:
    for _ in range(3):
        batches = iter(loader_of(teacher))
        next(batches)
        assert any(thread.name.startswith("tailcache") for thread in threading.enumerate())
        del batches
        assert not any(thread.name.startswith("tailcache") for thread in threading.enumerate())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iteration_ends_where_another_one_begins(teacher: Teacher, num_workers: int) -> None:
    """Both would take from one order, and from the same workers."""
    loader = loader_of(teacher, num_workers=num_workers, persistent_workers=num_workers > 0)
    before = iter(loader)
    next(before)
    loader.set_epoch(1)
    after = iter(loader)
    first = next(after)
    with pytest.raises(ConfigError, match="another iteration of this loader has begun"):
        list(before)
    plain = loader_of(teacher)
    plain.set_epoch(1)
    assert rows_in([first, *after]) == rows_in(plain)
    assert loader.epoch == 2
    loader.close()


def test_it_is_a_dataloader_that_accelerate_leaves_as_it_is(teacher: Teacher) -> None:
    loader = loader_of(teacher)
    assert isinstance(loader, DataLoader)
    assert Accelerator(cpu=True).prepare(loader) is loader


def test_waiting_is_counted(teacher: Teacher) -> None:
    loader = loader_of(teacher)
    list(loader)
    assert loader.waited_s > 0


def test_global_random_numbers_are_left_alone(teacher: Teacher) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for num_workers in (0, 1):
        next(iter(loader_of(teacher, num_workers=num_workers)))
    assert torch.equal(torch.rand(3), expected)


def test_a_teacher_that_was_replaced_is_noticed_by_workers(tmp_path: Path) -> None:
    exact = make_exact(make_corpus(tmp_path))
    exact.write("t")
    loader = loader_of(open_cache(tmp_path).teacher("t"), num_workers=1)
    folder = tmp_path / "teachers" / "t"
    folder.rename(tmp_path / "away")
    make_exact(exact.corpus, seed=9).write("t")
    with pytest.raises(MismatchError, match="changed since the loader was made"):
        list(loader)


PROCESSES = """
import json, sys
import torch
from tailcache.storage.reader import open_cache
from tailcache.trainers.loader import CacheLoader

torch.distributed.init_process_group("gloo")
loader = CacheLoader(open_cache(sys.argv[1]).teacher("t"), batch_rows=2, block_rows=3, window_blocks=4)
seen = []
for step, batch in enumerate(loader):
    seen += batch["row_indices"].tolist()
    if step == 2:
        break
found = [None] * torch.distributed.get_world_size()
torch.distributed.all_gather_object(found, {"seen": seen, "state": loader.state_dict()})
if torch.distributed.get_rank() == 0:
    print(json.dumps(found))
torch.distributed.destroy_process_group()  # its threads would end the process with an abort, now and then
"""


@pytest.mark.slow
def test_real_processes_know_their_places_and_agree(teacher: Teacher, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(teacher.corpus.cache_place)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = json.loads(done.stdout.splitlines()[-1])
    assert one["state"] == two["state"]
    rest, _ = run_of(teacher, 1, None, one["state"])
    assert sorted(one["seen"] + two["seen"] + rest) == train_rows(teacher)


def test_targets_of_all_rows_once(teacher: Teacher) -> None:
    """Not only rows: the values of an epoch are those of the cache, each once."""
    found = torch.cat([batch["log_target"] for batch in loader_of(teacher)]).numpy()
    stored = Targets.concatenate([teacher.row(row) for row in train_rows(teacher)]).log_target
    assert (np.sort(found) == np.sort(stored)).all()


def test_a_code_outside_its_table_is_found_by_its_shard(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums can match and yet a code be none, if it was written so; batches are decoded apart from reading."""
    other = open_cache(teacher.corpus.cache_place).teacher("t")
    codec = other._codec

    class Refusing:
        def decode(self, stored: Any, where: str) -> Targets:
            if "shard 2" in where or "shard" not in where:
                raise CorruptError(f"{where}, token_codes: expected codes from 0 to 36, found 0 to 99")
            found: Targets = codec.decode(stored, where)
            return found

    monkeypatch.setitem(vars(other), "_codec", Refusing())
    rows = np.arange(*other.layout.shard_rows(2))
    with pytest.raises(CorruptError, match="shard 2, token_codes"):
        list(loader_of(other, rows=np.intersect1d(rows, other.corpus.train_rows())))
