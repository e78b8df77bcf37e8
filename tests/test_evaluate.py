"""The evaluation: every figure against dense float64 loops, its sampling error against many captures, its documents."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from loss_cases import FLOAT64, Tolerance, assert_close, cached, extremes, make_case, student_logits, teacher_logprobs
from tokenizer_fixtures import SPECIAL, build_tokenizer
from tokenizers import decoders
from torch import Tensor, nn
from training_fixtures import logprobs_of, make_cache, make_corpus, tiny_model, write_teacher

from tailcache.pipeline.draws import thinned_points
from tailcache.storage.bootstrap import Figure
from tailcache.storage.errors import ConfigError, DataError, MismatchError
from tailcache.storage.reader import Teacher
from tailcache.trainers import evaluation
from tailcache.trainers.evaluation import DocumentSums, document_sums, evaluate_student, summarise, tail_ladder
from tailcache.trainers.evaluation_columns import bins_of, draw_variance, position_columns
from tailcache.trainers.evaluation_figures import SCALARS, Evaluation, differences

CODEC = Tolerance(2e-4, 2e-4)
"""Teacher's log-probs of a cache: rounded to some 1e-3 nats, the mean over positions is closer; masses to 2^-11."""
FORWARD = Tolerance(2e-5, 2e-5)
"""The student's own float32 forward, rows laid out in another way."""


# -- one position ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bins", [1, 4, 15])
@pytest.mark.parametrize("kind", ["random", "zipf", "flat", "peaked"])
@pytest.mark.parametrize(("top_k", "num_samples"), [(8, 5), (8, 0), (37, 0), (3, 2)])
def test_columns_of_each_position(kind: str, top_k: int, num_samples: int, num_bins: int) -> None:
    case = make_case(kind, top_k=top_k, num_samples=num_samples, student_scale=3.0)
    ks = [k for k in (1, 3, 8, 37) if k <= top_k]
    columns = position_columns(case.logits, case.teacher, num_bins=num_bins, tail_ks=ks, systematic=False)
    choice = "bucket" if num_samples == 0 else "sampled"
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        y, stored = int(case.next_tokens[t]), case.stored(t)
        expected = {
            "positions": 1.0,
            "cross_entropy": reference.cross_entropy(q, y),
            "teacher_cross_entropy": reference.cross_entropy(p, y),
            "kl": reference.kl_with_tail(choice, p, q, stored, case.samples(t)),
            "top1_agreement": reference.common_share(p, q, 1),
        }
        if top_k >= 5:
            expected["top5_agreement"] = reference.common_share(p, q, 5)
        for i, k in enumerate(ks):
            beyond = reference.others(len(p), reference.top_ids(p, k))
            expected[f"student_tail {i}"] = reference.mass(q, beyond)
            expected[f"teacher_tail {i}"] = reference.mass(p, beyond)
        for name, value in expected.items():
            name, _, index = name.partition(" ")
            found = columns[name][t] if not index else columns[name][t, int(index)]
            assert_close(float(found), value, Tolerance(1e-9, 1e-12))
        for whose, row in (("student", q), ("teacher", p)):
            if whose == "teacher" and columns["undecided"][t]:
                continue
            for m in range(num_bins):
                inside = [i for i, p_i in enumerate(row) if reference.equal_bin(p_i, num_bins) == m]
                assert columns[f"{whose}_all_count"][t, m] == len(inside)
                assert columns[f"{whose}_all_hits"][t, m] == (y in inside)
                assert_close(float(columns[f"{whose}_all_mass"][t, m]), reference.mass(row, inside), FLOAT64)
                best = reference.top_ids(row, 1)[0]
                assert columns[f"{whose}_top_count"][t, m] == (best in inside)
                assert columns[f"{whose}_top_hits"][t, m] == (best in inside and best == y)
                mass = row[best] if best in inside else 0.0
                assert_close(float(columns[f"{whose}_top_mass"][t, m]), mass, FLOAT64)
    assert ("top5_agreement" in columns) == (top_k >= 5)
    if top_k >= num_bins:
        assert not columns["undecided"].any()


def test_what_lies_beyond_the_stored_ids_is_only_binned_where_it_can_be() -> None:
    """A tail id has at most the K-th probability, and at most the tail's mass: else nobody knows its bin."""
    p = torch.tensor(
        [[0.30, 0.25, 0.20, 0.15, 0.10], [0.80, 0.12, 0.06, 0.01, 0.01], [0.60, 0.05, 0.05, 0.20, 0.10]],
        dtype=torch.float64,
    )
    logits = student_logits(3, 5)
    for top_k, undecided in ((1, [1, 1, 1]), (2, [1, 0, 1]), (3, [1, 0, 0]), (4, [0, 0, 0])):
        teacher = cached(p.log(), top_k, 2, torch.tensor([4, 0, 3]))
        found = position_columns(logits, teacher, num_bins=6, tail_ks=[1], systematic=False)["undecided"]
        assert found.tolist() == undecided, top_k


def test_edges_belong_to_the_bin_below() -> None:
    edges = torch.tensor([0.0, 0.25, 0.26, 0.5, 0.75, 0.76, 1.0, 1.0 + 1e-7], dtype=torch.float64)
    assert bins_of(edges, 4).tolist() == [0, 0, 1, 1, 2, 3, 3, 3]
    assert bins_of(edges, 1).tolist() == [0] * 8


@pytest.mark.parametrize("index", range(3))
def test_extreme_logits(index: int) -> None:
    """Logits of +-1e4 in float32: probabilities are still those of a distribution."""
    case = make_case("random", num_positions=8)
    logits = extremes()[index].detach()
    columns = position_columns(logits, case.teacher, num_bins=4, tail_ks=[1, 8], systematic=True)
    assert all(values.isfinite().all() for values in columns.values())
    assert_close(columns["student_all_mass"].sum(-1), torch.ones(8, dtype=torch.float64), Tolerance(0.0, 1e-6))
    q = torch.softmax(logits.double(), -1)
    expected = q.scatter(-1, case.teacher.token_ids, 0.0).sum(-1)
    assert_close(columns["student_tail"][:, 1], expected, Tolerance(1e-6, 1e-6))
    for t, row in enumerate(q.tolist()):
        inside = [i for i, q_i in enumerate(row) if reference.equal_bin(q_i, 4) == 0]
        assert_close(float(columns["student_all_mass"][t, 0]), reference.mass(row, inside), Tolerance(1e-6, 1e-6))


def test_padding_of_the_head_takes_no_part() -> None:
    case = make_case("random")
    padded = torch.cat([case.logits, torch.full((6, 4), 50.0, dtype=torch.float64)], dim=-1)
    plain, wide = (
        position_columns(z, case.teacher, num_bins=5, tail_ks=[1, 8], systematic=True) for z in (case.logits, padded)
    )
    for name, values in plain.items():
        assert torch.equal(values, wide[name]), name


# -- the error of the draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "kind"), [(16, "zipf"), (16, "random"), (4, "zipf")])
@pytest.mark.parametrize("systematic", [False, True], ids=["independent", "systematic"])
def test_the_sampling_error_is_that_of_many_captures(num: int, kind: str, systematic: bool) -> None:
    """Independent draws: the variance itself. Systematic ones: at least it, and less than independent draws have."""
    captures, top_k, vocab_size = 3000, 4, 60
    p = teacher_logprobs(kind, 8, vocab_size)
    log_q = torch.log_softmax(student_logits(8, vocab_size), -1)
    generator = torch.Generator().manual_seed(7)
    estimated, actual, independent = 0.0, 0.0, 0.0
    for t in range(len(p)):
        order = p[t].sort(descending=True).indices
        tail = p[t].exp().index_fill(0, order[:top_k], 0.0)
        alpha = float(tail.sum())
        if systematic:
            points = thinned_points(
                torch.rand(captures, generator=generator, dtype=torch.float64), torch.full((captures,), alpha), num
            )
            ids = torch.searchsorted((tail / alpha).cumsum(0), points.clamp_max(1 - 1e-12), right=True)
            ids = ids[:, torch.randperm(num, generator=generator)]
        else:
            ids = torch.multinomial(tail, captures * num, replacement=True, generator=generator).view(captures, num)
        values = log_q[t][ids]
        variance, number = draw_variance(values, ids, systematic=systematic)
        estimated += alpha**2 * float((variance / number).mean())
        actual += alpha**2 * float(values.mean(-1).var())
        independent += alpha**2 * float(values.flatten().var()) / float(number.mean())
    if systematic:
        assert 0.9 * actual < estimated < 1.1 * independent
    else:
        assert estimated == pytest.approx(actual, rel=0.1)


def test_repeated_draws_count_once() -> None:
    ids = torch.tensor([[3, 1, 3, 1, 3, 1], [5, 5, 5, 5, 5, 5], [1, 2, 2, 3, 4, 5]])
    values = ids.double()
    variance, number = draw_variance(values, ids, systematic=True)
    assert number.tolist() == [2.0, 1.0, 6.0]
    assert variance.tolist() == [2.0, 0.0, 4 / 2 / 5]
    independent, six = draw_variance(values, ids, systematic=False)
    assert six.tolist() == [6.0] * 3
    assert_close(independent, values.var(-1), FLOAT64)


# -- a cache -------------------------------------------------------------------------------------------------------


def _dense(teacher: Teacher, student: Any) -> dict[str, Any]:
    """p and q of the held-out positions as lists, and what else of them the figures need, from the corpus alone.

    `coded` is p with the stored ids' probabilities as the cache has them: rounding may carry one over a bin's edge.
    """
    corpus, model = teacher.corpus, tiny_model(teacher.vocab_size, seed=0)
    p_TV, y_T = logprobs_of(model, corpus)
    q_TV, _ = logprobs_of(student, corpus)
    rows = corpus.rows(0, corpus.num_rows)
    positions = np.flatnonzero(rows.supervised)
    row_T = np.searchsorted(rows.offsets, positions, side="right") - 1
    starts = rows.document_start.copy()
    starts[rows.offsets[:-1]] = True
    began_N = np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))
    keep = rows.held_out[row_T]
    stored = teacher.rows(0, corpus.num_rows)
    coded_TV = p_TV.scatter(-1, torch.from_numpy(stored.token_ids).long(), torch.from_numpy(stored.logprobs).double())
    return {
        "p": p_TV[keep].exp().tolist(),
        "coded": coded_TV[keep].exp().tolist(),
        "q": q_TV[keep].exp().tolist(),
        "y": y_T[keep].tolist(),
        "read": (positions - began_N[positions] + 1)[keep].tolist(),
        "position": positions[keep].tolist(),
        "row": row_T[keep].tolist(),
    }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Teacher, Any]:
    """A cache that stores the whole vocabulary, and a student."""
    teacher = make_cache(tmp_path_factory.mktemp("whole") / "cache", top_k=None, num_rows=40)
    return teacher, tiny_model(teacher.vocab_size, seed=3, std=0.4)


def test_figures_against_the_dense_reference(whole: tuple[Teacher, Any]) -> None:
    teacher, student = whole
    dense = _dense(teacher, student)
    p, q, y = dense["p"], dense["q"], dense["y"]
    found = evaluate_student(student, teacher, num_bins=6, tail_ks=[1, 3], show_progress=False, resamples=10)
    cross_entropy = _mean([reference.cross_entropy(row, i) for row, i in zip(q, y, strict=True)])
    expected = {
        "cross_entropy": cross_entropy,
        "perplexity": math.exp(cross_entropy),
        "teacher_cross_entropy": _mean([reference.cross_entropy(row, i) for row, i in zip(p, y, strict=True)]),
        "kl": _mean([reference.forward_kl(a, b) for a, b in zip(p, q, strict=True)]),
        "top1_agreement": _mean([reference.common_share(a, b, 1) for a, b in zip(p, q, strict=True)]),
        "top5_agreement": _mean([reference.common_share(a, b, 5) for a, b in zip(p, q, strict=True)]),
        "accuracy": _mean([float(reference.top_ids(row, 1) == [i]) for row, i in zip(q, y, strict=True)]),
        "teacher_accuracy": _mean([float(reference.top_ids(row, 1) == [i]) for row, i in zip(p, y, strict=True)]),
        "ece": reference.ece(q, y, 6),
        "teacher_ece": reference.ece(dense["coded"], y, 6),
        "full_ece": reference.full_ece(q, y, 6),
        "teacher_full_ece": reference.full_ece(dense["coded"], y, 6),
    }
    for name, value in expected.items():
        assert_close(getattr(found, name).value, value, CODEC)
    assert found.kl_is == "exact"
    assert found.kl_sampling_error == 0.0
    assert found.positions == len(y)
    for mass in found.tail_mass:
        off = [reference.others(len(row), reference.top_ids(row, mass.top_k)) for row in p]
        ours = _mean([reference.mass(row, ids) for row, ids in zip(q, off, strict=True)])
        theirs = _mean([reference.mass(row, ids) for row, ids in zip(p, off, strict=True)])
        assert_close(mass.student.value, ours, CODEC)
        assert_close(mass.teacher.value, theirs, CODEC)
        assert_close(mass.difference.value, ours - theirs, CODEC)


def test_figures_by_position(whole: tuple[Teacher, Any]) -> None:
    teacher, student = whole
    dense = _dense(teacher, student)
    found = evaluate_student(student, teacher, tail_ks=[3], show_progress=False, resamples=0)
    assert sum(bucket.positions for bucket in found.by_position) == len(dense["y"])
    assert len(found.by_position) == 5
    for bucket in found.by_position:
        at = [t for t, read in enumerate(dense["read"]) if bucket.first <= read <= bucket.last]
        assert bucket.positions == len(at)
        p, q, y = ([dense[name][t] for t in at] for name in "pqy")
        off = [reference.others(len(row), reference.top_ids(row, 3)) for row in p]
        assert_close(bucket.kl.value, _mean([reference.forward_kl(a, b) for a, b in zip(p, q, strict=True)]), CODEC)
        cross_entropy = _mean([reference.cross_entropy(row, i) for row, i in zip(q, y, strict=True)])
        assert_close(bucket.cross_entropy.value, cross_entropy, CODEC)
        [mass] = bucket.tail_mass
        assert_close(mass.student.value, _mean([reference.mass(row, i) for row, i in zip(q, off, strict=True)]), CODEC)


def test_the_calibration_curve_says_what_ece_is_made_of(whole: tuple[Teacher, Any]) -> None:
    teacher, student = whole
    found = evaluate_student(student, teacher, num_bins=6, show_progress=False, resamples=0)
    figures = {"student": found.ece, "teacher": found.teacher_ece, "student_all": found.full_ece}
    for name, figure in figures.items():
        bins = found.calibration[name]
        gaps = [b.count * abs((b.accuracy or 0.0) - (b.confidence or 0.0)) for b in bins]
        assert_close(math.fsum(gaps) / found.positions, figure.value, FLOAT64)
        assert all(b.confidence is None or b.low < b.confidence <= b.high or b.low == 0 for b in bins)
        assert sum(b.count for b in bins) == found.positions * (teacher.vocab_size if name == "student_all" else 1)


@pytest.mark.parametrize("layout", ["rows", "flat", "documents"])
@pytest.mark.parametrize("batch_rows", [1, 7])
def test_batches_and_layouts_leave_no_trace(
    whole: tuple[Teacher, Any], batch_rows: int, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = whole
    reference_sums = document_sums(student, teacher, batch_rows=3, show_progress=False)
    monkeypatch.setattr(evaluation, "buffer_bytes", lambda device: 16 * teacher.vocab_size * 5)
    found = document_sums(student, teacher, batch_rows=batch_rows, layout=layout, show_progress=False)
    assert found.names == reference_sums.names
    smooth = [i for i, name in enumerate(found.names) if "_top_" not in name and "_all_" not in name]
    assert_close(
        torch.from_numpy(found.sums_DC[:, smooth]), torch.from_numpy(reference_sums.sums_DC[:, smooth]), FORWARD
    )


def test_documents_are_followed_across_rows(whole: tuple[Teacher, Any]) -> None:
    """Held-out rows are every fourth, and most of them go on with the document of the held-out row before."""
    teacher, student = whole
    corpus = teacher.corpus
    sums = document_sums(student, teacher, batch_rows=3, show_progress=False)
    counts: list[int] = []
    opened = False
    for row in teacher.held_out_rows().tolist():
        block = corpus.rows(row, row + 1)
        for start, supervised in zip(block.document_start, block.supervised, strict=True):
            if start or not opened:
                counts.append(0)
                opened = True
            counts[-1] += int(supervised)
    expected = [count for count in counts if count]
    assert sums.sums_DC[:, sums.names.index("positions")].tolist() == expected
    assert len(expected) < sum(corpus.rows(r, r + 1).document_start[1:].sum() + 1 for r in teacher.held_out_rows())


def test_rows_that_do_not_follow_one_another_are_not_joined(whole: tuple[Teacher, Any]) -> None:
    teacher, student = whole
    rows = teacher.held_out_rows()[[0, 2]]
    sums = document_sums(student, teacher, rows=rows, show_progress=False)
    parts = [document_sums(student, teacher, rows=rows[i : i + 1], show_progress=False) for i in (0, 1)]
    assert len(sums.sums_DC) == sum(len(part.sums_DC) for part in parts)


def test_rows_of_both_sides_are_refused(whole: tuple[Teacher, Any]) -> None:
    teacher, student = whole
    for rows in (np.arange(3), np.array([0, teacher.num_rows])):
        with pytest.raises(ConfigError, match="expected rows of one side of the corpus"):
            document_sums(student, teacher, rows=rows, show_progress=False)


def test_bootstrap_draws_documents(whole: tuple[Teacher, Any]) -> None:
    """The interval of a mean is that of the theory for sums of independent documents."""
    teacher, student = whole
    sums = document_sums(student, teacher, rows=teacher.train_rows(), show_progress=False)
    found = summarise(sums, resamples=4000, confidence=0.9)
    num, total = (sums.sums_DC[:, sums.names.index(name)] for name in ("positions", "cross_entropy"))
    mean = total.sum() / num.sum()
    error = float(np.sqrt(((total - mean * num) ** 2).sum()) / num.sum())
    assert found.cross_entropy.value == pytest.approx(mean)
    low, high = found.cross_entropy.low, found.cross_entropy.high
    assert low is not None
    assert high is not None
    assert (high - low) / 2 == pytest.approx(1.645 * error, rel=0.15)
    assert summarise(sums, resamples=0).kl.low is None
    assert found == summarise(sums, resamples=4000, confidence=0.9)


def test_differences_are_paired(whole: tuple[Teacher, Any]) -> None:
    """Of two students that hardly differ, the difference is known far better than either figure."""
    teacher, student = whole
    other = tiny_model(teacher.vocab_size, seed=3, std=0.4)
    with torch.no_grad():
        other.get_output_embeddings().weight[5] += 0.05
    rows = teacher.train_rows()
    sums = [document_sums(model, teacher, rows=rows, show_progress=False) for model in (student, other)]
    found = differences(*sums, resamples=500)
    first, second = (summarise(each, resamples=500) for each in sums)
    for name, difference in found.items():
        assert difference.value == pytest.approx(getattr(second, name).value - getattr(first, name).value, abs=1e-12)
    assert set(found) == {name for name in SCALARS if "teacher" not in name and name != "bits_per_byte"}
    width = {name: high - low for name, (low, high) in _intervals(found | {"alone": first.kl}).items()}
    assert 0 < width["kl"] < 0.2 * width["alone"]
    assert differences(sums[0], sums[0], resamples=20)["full_ece"] == Figure(value=0.0, low=0.0, high=0.0)


def _intervals(figures: dict[str, Figure]) -> dict[str, tuple[float, float]]:
    return {name: (f.low, f.high) for name, f in figures.items() if f.low is not None and f.high is not None}


def test_differences_need_the_same_documents(whole: tuple[Teacher, Any]) -> None:
    teacher, student = whole
    rows = teacher.held_out_rows()
    sums = document_sums(student, teacher, rows=rows[:3], show_progress=False)
    with pytest.raises(MismatchError, match="on the same documents"):
        differences(sums, document_sums(student, teacher, rows=rows[3:6], show_progress=False))
    with pytest.raises(MismatchError, match="num_bins to agree, found 15 and 4"):
        differences(sums, document_sums(student, teacher, rows=rows[:3], num_bins=4, show_progress=False))


def test_json_is_strict_json(whole: tuple[Teacher, Any]) -> None:
    teacher, student = whole
    found = evaluate_student(student, teacher, resamples=20, show_progress=False)
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert record["kl"]["value"] == found.kl.value
    assert record["bits_per_byte"] is None
    assert "tokenizer" in record["unavailable"]["bits_per_byte"]
    assert record["tail_mass"][0]["student"]["value"] == found.tail_mass[0].student.value


# -- what a smaller cache still says -------------------------------------------------------------------------------


def _partial(folder: Path, **sizes: Any) -> tuple[Teacher, Any, Evaluation]:
    teacher = make_cache(folder / "cache", **sizes)
    student = tiny_model(teacher.vocab_size, seed=3, std=0.4)
    return teacher, student, evaluate_student(student, teacher, num_bins=6, show_progress=False, resamples=10)


def test_a_truncated_cache_gives_the_same_figures(tmp_path: Path, whole: tuple[Teacher, Any]) -> None:
    """K >= M: exact but for the KL, whose draws have an error that is told."""
    _, student = whole
    teacher = make_cache(tmp_path / "cache", top_k=6, num_samples=6, num_rows=40)
    dense = _dense(teacher, student)
    p, q, y = dense["p"], dense["q"], dense["y"]
    found = evaluate_student(student, teacher, num_bins=6, show_progress=False, resamples=10)
    assert found.teacher_full_ece is not None
    assert_close(found.teacher_full_ece.value, reference.full_ece(dense["coded"], y, 6), CODEC)
    assert_close(found.full_ece.value, reference.full_ece(q, y, 6), CODEC)
    assert_close(found.teacher_ece.value, reference.ece(dense["coded"], y, 6), CODEC)
    kl = _mean([reference.forward_kl(a, b) for a, b in zip(p, q, strict=True)])
    assert found.kl_is == "unbiased"
    assert found.kl_sampling_error is not None
    assert 0 < abs(found.kl.value - kl) < 4 * found.kl_sampling_error


def test_too_few_stored_ids_are_said_and_not_guessed(tmp_path: Path) -> None:
    _, _, found = _partial(tmp_path, top_k=2, num_samples=1)
    assert found.teacher_full_ece is None
    assert "use at most 2 bins" in found.unavailable["teacher_full_ece"]
    assert found.top5_agreement is None
    assert "only 2 tokens" in found.unavailable["top5_agreement"]
    assert found.kl_sampling_error is None
    assert "single tail draw" in found.unavailable["kl_sampling_error"]
    assert "teacher_all" not in found.calibration


def test_without_draws_the_kl_is_a_lower_bound(tmp_path: Path) -> None:
    _, _, found = _partial(tmp_path, top_k=6, num_samples=0)
    assert found.kl_is == "lower bound"
    assert found.kl_sampling_error is None
    assert "no tail draws" in found.unavailable["kl_sampling_error"]


def test_positions_with_one_draw_have_the_average_variance() -> None:
    names = ("positions", "kl_variance", "draw_variance", "weight_known", "weight_single")
    sums = {"positions": 10.0, "kl_variance": 0.6, "draw_variance": 4.0, "weight_known": 2.0, "weight_single": 0.5}
    found = _sampling_error(names, sums)
    assert found == pytest.approx(math.sqrt(0.6 + 0.5 * 4.0 / 2.0) / 10.0)


def _sampling_error(names: tuple[str, ...], values: dict[str, float]) -> float | None:
    from tailcache.trainers.evaluation_figures import _Maker

    sums = replace(_EMPTY, names=names, sums_DC=np.array([[values[name] for name in names]]))
    return _Maker(sums, resamples=0, confidence=0.9, seed=0).kl_sampling_error()


_EMPTY = DocumentSums(
    names=(),
    sums_DC=np.zeros((0, 0)),
    num_rows=0,
    num_bins=1,
    tail_ks=(),
    num_buckets=1,
    no_bytes=None,
    corpus_hash="",
    teacher="",
    teacher_hash="",
    top_k=4,
    vocab_size=9,
    num_samples=4,
    kl_is="unbiased",
)


# -- students, bytes, mistakes -------------------------------------------------------------------------------------


class _Twice(nn.Module):
    """A head that is not a linear layer: twice that of a linear layer with half of the weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = nn.Linear(linear.in_features, linear.out_features, bias=False)
        self.linear.weight = nn.Parameter(linear.weight.detach() / 2)

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = 2 * self.linear(hidden)
        return result


def test_a_head_that_is_not_linear_gives_the_same(whole: tuple[Teacher, Any]) -> None:
    teacher, student = whole
    expected = evaluate_student(student, teacher, resamples=0, show_progress=False)
    other = tiny_model(teacher.vocab_size, seed=3, std=0.4)
    other.set_output_embeddings(_Twice(other.get_output_embeddings()))
    found = evaluate_student(other, teacher, resamples=0, show_progress=False)
    for name in ("cross_entropy", "kl", "ece", "full_ece", "top5_agreement"):
        assert_close(getattr(found, name).value, getattr(expected, name).value, FORWARD)


def test_bf16_is_near(whole: tuple[Teacher, Any]) -> None:
    teacher, student = whole
    exact = evaluate_student(student, teacher, resamples=0, show_progress=False)
    rounded = evaluate_student(student, teacher, resamples=0, precision="bf16", show_progress=False)
    assert rounded.kl != exact.kl
    assert rounded.kl.value == pytest.approx(exact.kl.value, rel=0.05)


def test_the_model_is_left_as_it_was(whole: tuple[Teacher, Any]) -> None:
    teacher, student = whole
    student.train()
    evaluate_student(student, teacher, rows=teacher.held_out_rows()[:1], resamples=0, show_progress=False)
    assert student.training
    student.eval()


def test_bits_per_byte_are_by_the_bytes_of_the_text(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("bpe")
    corpus = make_corpus(tmp_path / "cache", tokenizer)
    logprobs, y = logprobs_of(tiny_model(corpus.vocab_size), corpus)
    teacher = write_teacher(corpus, logprobs, y, name="a", top_k=20, num_samples=2)
    student = tiny_model(corpus.vocab_size, seed=3)
    dense = _dense(teacher, student)
    found = evaluate_student(student, teacher, resamples=0, show_progress=False)
    alphabet = {c: b for b, c in _byte_alphabet().items()}
    names = tokenizer.convert_ids_to_tokens(dense["y"])
    num_bytes = sum(len(bytes(alphabet[c] for c in name)) for name in names if name not in SPECIAL)
    nats = math.fsum(reference.cross_entropy(q, i) for q, i in zip(dense["q"], dense["y"], strict=True))
    assert found.bits_per_byte is not None
    assert_close(found.bits_per_byte.value, nats / math.log(2) / num_bytes, CODEC)


def test_text_with_unknown_tokens_has_no_bytes(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("unigram")
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    corpus = make_corpus(tmp_path / "cache", tokenizer, num_rows=8)
    assert tokenizer.unk_token_id in corpus.rows(0, 8).tokens
    teacher = write_teacher(
        corpus, *logprobs_of(tiny_model(corpus.vocab_size), corpus), name="a", top_k=8, num_samples=2
    )
    found = evaluate_student(tiny_model(corpus.vocab_size, seed=3), teacher, show_progress=False, resamples=5)
    assert found.bits_per_byte is None
    assert "unknown tokens" in found.unavailable["bits_per_byte"]


def _byte_alphabet() -> dict[int, str]:
    """The byte-level tokenizers' name of each byte, by its published rule."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def test_no_held_out_rows_are_an_error(tmp_path: Path) -> None:
    teacher = make_cache(tmp_path / "cache", held_out_every=0)
    with pytest.raises(DataError, match="expected held-out rows to evaluate on, found none"):
        evaluate_student(tiny_model(teacher.vocab_size), teacher)


@pytest.mark.parametrize("wrong", [{"batch_rows": 0}, {"num_bins": 0}, {"tail_ks": [99]}, {"tail_ks": [0]}])
def test_numbers_that_make_no_sense(whole: tuple[Teacher, Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="evaluation: expected at least 1 row per batch"):
        evaluate_student(whole[1], whole[0], **wrong)


def test_the_ladder_ends_at_the_stored_k() -> None:
    assert tail_ladder(1) == [1]
    assert tail_ladder(10) == [1, 5, 10]
    assert tail_ladder(64) == [1, 5, 10, 20, 50, 64]
