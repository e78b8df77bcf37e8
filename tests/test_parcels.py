"""Blocks in shared memory: whole on the other side, and never written over while anything looks at them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tailcache.storage.blocks import Block
from tailcache.storage.corpus import Rows
from tailcache.trainers.block_sources import Workers
from tailcache.trainers.parcels import Packer, Parcel, Unpacker


def block_of(num: int, seed: int = 0) -> Block:
    generator = np.random.default_rng(seed)
    rows = Rows(
        row_indices=np.arange(2),
        offsets=np.array([0, num // 2, num]),
        tokens=generator.integers(0, 1 << 40, num),
        document_start=generator.random(num) < 0.5,
        supervised=generator.random(num) < 0.5,
        held_out=np.zeros(2, bool),
    )
    codes = generator.integers(0, 1 << 16, (num, 5)).astype(np.uint16)
    stored: dict[str, NDArray[Any]] = {"codes": codes, "gaps": np.asfortranarray(codes), "none": codes[:, :0]}
    return Block(rows=rows, stored=stored, target_offsets=np.array([0, 1, num]), chosen=np.arange(2))


def arrays(block: Block) -> dict[str, NDArray[Any]]:
    return {**vars(block.rows), **block.stored, "target_offsets": block.target_offsets, "chosen": block.chosen}


def assert_same(found: Block, expected: Block) -> None:
    for name, values in arrays(expected).items():
        other = arrays(found)[name]
        assert other.dtype == values.dtype, name
        assert other.flags.f_contiguous == values.flags.f_contiguous, name
        np.testing.assert_array_equal(other, values, err_msg=name)


def handed(parcel: Parcel) -> Parcel:
    """What the consumer is given: other tensors over the same memory."""
    data = None if parcel.data is None else parcel.data.view(-1)
    return Parcel(**{**vars(parcel), "data": data})


def test_blocks_come_whole_and_memory_is_used_again() -> None:
    packer, unpacker = Packer(), Unpacker()
    numbers, sent = [], []
    for seed in range(6):
        parcel = handed(packer.pack(seed, block_of(100, seed)))
        assert parcel.visit == seed
        numbers.append(parcel.number)
        sent.append(parcel.data is not None)
        assert_same(unpacker.unpack(parcel), block_of(100, seed))
    assert numbers == [0] * 6
    assert sent == [True] + [False] * 5


@pytest.mark.parametrize("name", ["codes", "gaps", "tokens", "supervised", "offsets", "target_offsets", "chosen"])
def test_one_array_or_a_view_of_it_keeps_its_block(name: str) -> None:
    packer, unpacker = Packer(), Unpacker()
    first = arrays(unpacker.unpack(handed(packer.pack(0, block_of(100, 0)))))[name]
    view, expected = first[1:], arrays(block_of(100, 0))[name][1:]
    del first
    for seed in range(1, 4):
        parcel = packer.pack(seed, block_of(100, seed))
        assert parcel.number == 1
        unpacker.unpack(handed(parcel))
    np.testing.assert_array_equal(view, expected)
    del view
    assert packer.pack(4, block_of(100)).number == 0


def test_what_is_on_its_way_is_not_written_over_until_another_iteration_begins() -> None:
    packer, unpacker = Packer(), Unpacker()
    held = unpacker.unpack(handed(packer.pack(0, block_of(100, 0))))
    on_their_way = [handed(packer.pack(visit, block_of(100, visit))) for visit in (1, 2)]
    assert [parcel.number for parcel in on_their_way] == [1, 2]
    assert_same(unpacker.unpack(on_their_way[0]), block_of(100, 1))  # and let go of
    packer.begin()  # the other one was never received
    again = [handed(packer.pack(visit, block_of(100, visit))) for visit in (3, 4, 5)]
    assert sorted(parcel.number for parcel in again) == [1, 2, 3]
    for parcel in again:
        assert_same(unpacker.unpack(parcel), block_of(100, parcel.visit))
    assert_same(held, block_of(100, 0))


def test_a_block_of_another_visit_is_refused() -> None:
    packer = Packer()
    workers = Workers(iter([packer.pack(3, block_of(100)), packer.pack(5, block_of(100))]), Unpacker())
    workers.announce([3, 4])
    assert_same(workers.get(3), block_of(100))
    with pytest.raises(RuntimeError, match="expected the block of visit 4, found that of visit 5"):
        workers.get(4)


def test_larger_blocks_take_the_place_of_memory_that_is_too_small() -> None:
    packer, unpacker = Packer(), Unpacker()
    for visit, num in enumerate([100, 105, 300, 40, 900]):
        parcel = handed(packer.pack(visit, block_of(num)))
        assert_same(unpacker.unpack(parcel), block_of(num))
        assert len(packer._pieces) == len(unpacker._pieces) == 1
    assert parcel.number == 2
