"""Which of a teacher's layers, heads and dimensions a smaller student keeps.

Layers are spread evenly, the first and the last among them. Within a layer:

* Query heads stay with the key-value head that they were trained with. A student whose groups are not larger than the
  teacher's keeps the first key-value heads, and of each one's query heads the first. Where its groups are larger (fewer
  key-value heads for as many queries), several of the teacher's groups become one, and their key-value heads' mean is
  its key-value head.
* The rotary part of a head consists of pairs (i, i + R/2) that are turned by one angle, position x frequency i. Pairs
  are kept or dropped as a whole, and land where the student turns them as nearly as possible as the teacher did:
  student pair j of r/2 has the frequency base^(-2j/r), so it takes the teacher's pair nearest to j R/r. Where r divides
  R, frequencies are exactly the teacher's.
* Dimensions that are not rotated (the rest of a partly rotary head, values, hidden columns): the first.

Plain numbers, no tensors: what is made of them is in ``initialise``.

Legend: R, r rotary dimensions of a head of the teacher and of the student; D, d all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tailcache.storage.errors import StudentError

__all__ = ["Heads", "kept_dimensions", "kept_heads", "kept_layers", "kept_pairs"]


@dataclass(frozen=True)
class Heads:
    """What a student's heads are made of.

    Attributes:
      queries: for each query head of the student, the teacher's.
      key_values: for each key-value head of the student, those of the teacher whose mean it is; mostly one.
    """

    queries: tuple[int, ...]
    key_values: tuple[tuple[int, ...], ...]


def kept_layers(num_teacher: int, num_student: int, chosen: Sequence[int] | None = None) -> tuple[int, ...]:
    """The teacher's layer for each layer of the student.

    Args:
      num_teacher: the teacher's layers.
      num_student: the student's; ignored where they are chosen.
      chosen: the choice of the user, or None for evenly spread ones.

    Raises:
      StudentError: more layers than the teacher has, or one that it does not have.
    """
    if chosen is not None:
        if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= num_teacher:
            raise StudentError(
                f"student.layers: expected ascending numbers of the teacher's layers, 0 to {num_teacher - 1}, found "
                f"{' '.join(map(str, chosen)) or 'none'}"
            )
        return tuple(chosen)
    if num_student > num_teacher:
        raise StudentError(
            f"student.num_layers: expected at most {num_teacher}, the layers of the teacher to take them from, found "
            f"{num_student}"
        )
    gaps = max(num_student - 1, 1)
    return tuple((2 * j * (num_teacher - 1) + gaps) // (2 * gaps) for j in range(num_student))


def kept_heads(teacher: tuple[int, int], student: tuple[int, int]) -> Heads:
    """The teacher's heads for each head of the student.

    Args:
      teacher: its numbers of query and key-value heads.
      student: likewise.

    Raises:
      StudentError: numbers that do not divide, or cannot be had from the teacher's.
    """
    for who, (queries, key_values) in (("teacher", teacher), ("student", student)):
        if key_values < 1 or queries % key_values:
            raise StudentError(
                f"student: expected a number of attention heads that its key-value heads divide, found {queries} and "
                f"{key_values} for the {who}"
            )
    group, own_group = teacher[0] // teacher[1], student[0] // student[1]
    merged = -(-own_group // group)  # of the teacher's groups in one of the student's
    if student[1] * merged > teacher[1]:
        raise StudentError(
            f"student.num_kv_heads: expected heads that the teacher's {teacher[0]} query and {teacher[1]} key-value "
            f"heads can be cut down to, found {student[0]} and {student[1]}; choose at most {teacher[1]} key-value "
            f"heads and at most {group} query heads for each"
        )
    first = [head * merged for head in range(student[1])]
    return Heads(
        tuple(start * group + i for start in first for i in range(own_group)),
        tuple(tuple(range(start, start + merged)) for start in first),
    )


def kept_pairs(rotary: int, own_rotary: int) -> tuple[int, ...]:
    """The teacher's rotary pair (of R/2) for each pair of the student (of r/2).

    Raises:
      StudentError: the student has more, or an odd number of dimensions.
    """
    if own_rotary > rotary or rotary % 2 or own_rotary % 2:
        raise StudentError(
            f"student.head_dim: expected an even number of rotary dimensions, at most the teacher's {rotary}, found "
            f"{own_rotary}"
        )
    return tuple((2 * j * rotary + own_rotary) // (2 * own_rotary) for j in range(own_rotary // 2))


def kept_dimensions(head_dim: int, own_head_dim: int, rotary: int, own_rotary: int) -> tuple[int, ...]:
    """The teacher's dimension of a query or key head for each dimension of the student's.

    Args:
      head_dim: D.
      own_head_dim: d.
      rotary: R, the first so many of D.
      own_rotary: r.

    Raises:
      StudentError: there are not as many.
    """
    pairs = kept_pairs(rotary, own_rotary)
    if own_head_dim - own_rotary > head_dim - rotary:
        raise StudentError(
            f"student.head_dim: expected at most {head_dim - rotary} dimensions of a head that are not rotary, the "
            f"teacher's, found {own_head_dim - own_rotary}"
        )
    rest = range(rotary, rotary + own_head_dim - own_rotary)
    return (*pairs, *(pair + rotary // 2 for pair in pairs), *rest)
