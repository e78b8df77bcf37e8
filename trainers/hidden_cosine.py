"""Hidden-state cosine: the student's last hidden state should point where the teacher's does.

Legend: T target positions, D hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailcache.storage.errors import MismatchError

__all__ = ["hidden_cosine"]


def hidden_cosine(student_hidden_TD: Tensor, teacher_hidden_TD: Tensor) -> Tensor:
    """1 - cos(s, t) of the last hidden states, those that the heads are multiplied with.

    Args:
      student_hidden_TD: [T, D] any float type.
      teacher_hidden_TD: [T, D] any float type, a constant; of the same width.

    Returns:
      [T] between 0 and 2, no unit; float32, or float64 for float64 inputs. 1, with gradient 0, where one of the two is
      all zeros. Gradient with respect to s: -(t / |t| - cos s / |s|) / |s|. Exact up to the rounding of the stored
      state.

    Raises:
      MismatchError: the two are not of one shape.

    Source: TAD (arXiv 2602.20816), section 3.2.2; Sanh et al., "DistilBERT" (arXiv 1910.01108), section 3.
    """
    if student_hidden_TD.shape != teacher_hidden_TD.shape:
        raise MismatchError(
            f"hidden_cosine: expected hidden states of one shape, found {list(student_hidden_TD.shape)} for the "
            f"student and {list(teacher_hidden_TD.shape)} for the teacher; project the states of a student of "
            "another width first"
        )
    return 1 - (_direction(student_hidden_TD) * _direction(teacher_hidden_TD)).sum(-1)


def _direction(hidden_TD: Tensor) -> Tensor:
    """The state over its length, 0 where it is all zeros; scaled first, so that no square over- or underflows."""
    wide_TD = hidden_TD if hidden_TD.dtype == torch.float64 else hidden_TD.float()
    largest_T1 = wide_TD.detach().abs().amax(-1, keepdim=True)
    some_T1 = largest_T1 > 0
    scaled_TD = wide_TD / torch.where(some_T1, largest_T1, 1.0)
    square_T1 = torch.where(some_T1, scaled_TD.square().sum(-1, keepdim=True), 1.0)
    return torch.where(some_T1, scaled_TD * square_T1.rsqrt(), 0.0)
