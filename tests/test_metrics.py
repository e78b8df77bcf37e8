"""Held-out metrics: each against the reference, the choice of KL, sums that batches leave no trace in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from loss_cases import FLOAT64, Case, Tolerance, assert_close, cached, make_case, select
from torch import Tensor

from tailcache.trainers.linear_head import LinearHead
from tailcache.trainers.metrics import METRICS, HeldOutSums, kl_kind, metrics_of_hidden, metrics_of_logits
from tailcache.trainers.terms import TeacherTerms


def _column(values: Tensor, name: str) -> list[float]:
    column: list[float] = values[:, METRICS.index(name)].tolist()
    return column


def _of_hidden(logits: Tensor, teacher: TeacherTerms) -> Tensor:
    """The same logits as hidden states whose head is the identity."""
    head = LinearHead(weight=torch.eye(logits.shape[1], dtype=logits.dtype), vocab_size=teacher.vocab_size)
    return metrics_of_hidden(logits, head, teacher)


@pytest.mark.parametrize("metrics", [metrics_of_logits, _of_hidden])
@pytest.mark.parametrize("kind", ["random", "zipf", "peaked"])
@pytest.mark.parametrize(("top_k", "num_samples"), [(8, 5), (8, 0), (37, 0)])
def test_metrics_of_each_position(
    kind: str, top_k: int, num_samples: int, metrics: Callable[[Tensor, TeacherTerms], Tensor]
) -> None:
    case = make_case(kind, top_k=top_k, num_samples=num_samples)
    values = metrics(case.logits, case.teacher)
    choice = "bucket" if num_samples == 0 else "sampled"
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        y = int(case.next_tokens[t])
        stored, samples = case.teacher.token_ids[t].tolist(), case.teacher.tail_samples[t].tolist()
        assert_close(_column(values, "cross_entropy")[t], reference.cross_entropy(q, y), FLOAT64)
        assert_close(_column(values, "teacher_cross_entropy")[t], reference.cross_entropy(p, y), FLOAT64)
        assert_close(_column(values, "kl")[t], reference.kl_with_tail(choice, p, q, stored, samples), FLOAT64)
        assert _column(values, "top1_agreement")[t] == (reference.top_ids(p, 1) == reference.top_ids(q, 1))


def test_agreement_is_one_with_itself_and_padding_rows_of_the_head_cannot_win() -> None:
    case = make_case("random")
    logits = torch.tensor(case.p, dtype=torch.float64).log()
    padded = torch.cat([logits, torch.full((6, 4), 9.0, dtype=torch.float64)], dim=-1)
    for own in (logits, padded):
        for metrics in (metrics_of_logits, _of_hidden):
            assert _column(metrics(own, case.teacher), "top1_agreement") == [1.0] * 6
            assert _column(metrics(-own, case.teacher), "top1_agreement") == [0.0] * 6


def _mean_kl(case: Case, num_samples: int, num_captures: int) -> Tensor:
    logprobs = torch.tensor(case.p[:1], dtype=torch.float64).log().expand(num_captures, -1)
    next_tokens = torch.zeros(num_captures, dtype=torch.long)
    teacher = cached(logprobs, 8, num_samples, next_tokens)
    values = metrics_of_logits(case.logits[:1].expand(num_captures, -1), teacher)
    return values[:, METRICS.index("kl")].mean()


def test_the_sampled_kl_is_unbiased_and_the_bucket_a_lower_bound() -> None:
    case = make_case("random")
    dense = reference.forward_kl(case.p[0], case.q[0])
    assert_close(_mean_kl(case, 16, 4000).item(), dense, Tolerance(0.01, 0.0))
    assert _mean_kl(case, 0, 1) < 0.95 * dense


def test_what_the_kl_is_called() -> None:
    assert kl_kind(top_k=8, vocab_size=37, num_samples=4) == "unbiased"
    assert kl_kind(top_k=8, vocab_size=37, num_samples=0) == "lower bound"
    assert kl_kind(top_k=37, vocab_size=37, num_samples=0) == "exact"


def test_a_mean_does_not_depend_on_its_batches() -> None:
    case = make_case("zipf", num_positions=8)
    whole, parts = HeldOutSums.empty(), HeldOutSums.empty()
    whole.add(metrics_of_logits(case.logits, case.teacher))
    for part in torch.split(torch.arange(8), 3):
        parts.add(metrics_of_logits(case.logits[part], select(case.teacher, part)))
    assert whole.means()["positions"] == parts.means()["positions"] == 8
    for name in METRICS:
        assert_close(parts.means()[name], whole.means()[name], FLOAT64)
