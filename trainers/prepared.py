"""The loss of one micro-batch, worked out at the student's head: fused with it, or from full logits.

Most parts are functions of terms and go through ``fused_loss``. If any needs whole rows of both distributions, all go
through ``chunked_loss``, which makes those rows a few positions at a time. The cosine of hidden states needs no logits.

Legend: T target positions, c of them at a time, V vocabulary, W width of a head, D hidden width, P parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tailcache.trainers.fused_loss import Mode, chunked_loss, fused_loss
from tailcache.trainers.hidden_cosine import hidden_cosine
from tailcache.trainers.linear_head import LinearHead
from tailcache.trainers.parts import Part, Rows
from tailcache.trainers.projection import project
from tailcache.trainers.terms import StudentTerms, TeacherTerms, student_terms

__all__ = ["Aids", "Prepared"]


@dataclass(frozen=True, kw_only=True)
class Aids:
    """What an objective needs of a teacher beside its targets, on the training device.

    Attributes:
      fills: [V] float32 weights by tail choice, "prior" and "uniform", those that are needed.
      heads: the teacher's head, where its own tail is needed; of a mixture, one for each teacher.
    """

    fills: dict[str, Tensor]
    heads: tuple[LinearHead, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The parts of one micro-batch but the cosine, as functions of some of its positions.

    Attributes:
      parts: one function each.
      teacher: the targets of all T positions.
      aids: fills and the teacher's head.
      own: the teacher's own [c, V] log-probs at some positions, where they are needed.
      mean_fills: the fills under which means of the student's log q are needed.
      temperatures: the further ones at which the student's terms are needed.
      hidden_TD: the teacher's hidden states, where they are compared.
      num_dense: how many of the parts need whole rows of logits.
      has_cosine: whether the hidden states are compared, as one more part, the last.
    """

    parts: tuple[Part, ...]
    teacher: TeacherTerms
    aids: Aids
    own: Callable[[slice], Tensor] | None = None
    mean_fills: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = ()
    hidden_TD: Tensor | None = None
    num_dense: int = 0
    has_cosine: bool = False

    def of_terms(self, rows: slice, teacher: TeacherTerms, student: StudentTerms) -> Tensor:
        """[c, P] from the terms of some positions; only where none of the parts is dense."""
        return torch.stack([part(rows, teacher, student, None) for part in self.parts], dim=-1)

    def of_logits(self, rows: slice, logits_cW: Tensor) -> Tensor:
        """[c, P] from the student's whole rows of logits at some positions."""
        teacher = self.teacher.rows(rows)
        logits_cV = logits_cW[:, : teacher.vocab_size]
        own_cV = None if self.own is None else self.own(rows)
        fills = {
            name: own_cV.exp() if name == "exact" and own_cV is not None else self.aids.fills[name]
            for name in self.mean_fills
        }
        student = student_terms(logits_cV, teacher, fills=fills, temperatures=self.temperatures)
        whole = Rows(logits_cV, teacher, self.aids.fills, own_cV)
        return torch.stack([part(rows, teacher, student, whole) for part in self.parts], dim=-1)

    def from_hidden(
        self,
        hidden_TD: Tensor,
        head: LinearHead,
        coefficients_P: Tensor,
        mode: Mode,
        projection_ED: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss fused with the student's head.

        Args:
          hidden_TD: [T, D] the head's input.
          head: the student's.
          coefficients_P: [P] what each part counts.
          mode: see ``fused_loss``; dense parts have one mode only.
          projection_ED: takes the student's hidden states to the teacher's width E, where that is another.

        Returns:
          The sum over positions and parts, differentiable, and the parts [T, P], nats.
        """
        coefficients = coefficients_P[: len(self.parts)]
        if self.num_dense:
            # Some ten tensors of the logits' size for each divergence that sees them all.
            buffers = 10 * self.num_dense
            total, values_TP = chunked_loss(hidden_TD, head, self.of_logits, coefficients, num_buffers=buffers)
        else:
            fills = {name: self.aids.fills[name] for name in self.mean_fills}
            total, values_TP = fused_loss(
                hidden_TD,
                head,
                self.teacher,
                self.of_terms,
                coefficients,
                mode=mode,
                fills=fills,
                temperatures=self.temperatures,
            )
        if self.has_cosine and self.hidden_TD is not None:
            own_TE = hidden_TD if projection_ED is None else project(hidden_TD, projection_ED)
            cosine_T = hidden_cosine(own_TE, self.hidden_TD)
            total = total + coefficients_P[-1] * cosine_T.sum()
            values_TP = torch.cat([values_TP, cosine_T.detach()[:, None].to(values_TP.dtype)], dim=-1)
        return total, values_TP

    def from_logits(self, logits_TW: Tensor, coefficients_P: Tensor) -> tuple[Tensor, Tensor]:
        """The same from full logits; not for the cosine."""
        with torch.autocast(device_type=logits_TW.device.type, enabled=False):
            values_TP = self.of_logits(slice(0, len(logits_TW)), logits_TW)
            return (values_TP * coefficients_P.to(values_TP.dtype)).sum(), values_TP.detach()
