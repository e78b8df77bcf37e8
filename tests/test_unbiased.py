"""Averaged over independent captures, the gradients from the cache go to the exact ones as 1 / sqrt(captures).

The captures are real: logits go through ``summarise_logits`` once per capture, with the numbers of ``uniforms`` for a
seed of its own. The losses go through ``student_terms`` and autograd. The exact gradients are typed from the equations,
dense and in float64. A fixed fill is measured in the same way and does not converge: that is what a bias looks like.

R captures of m draws are one teacher with R m draws, since every loss here is a mean over the draws; that this gives
the same gradient as R captures averaged one by one is the first test.

Legend: R captures, T positions, V vocabulary, K kept, m draws per capture.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loss_cases import FLOAT32, FLOAT64, SIGMAS, SLOPE, assert_close
from torch import Tensor

from tailcache.pipeline.draws import draw_key, num_distinct, uniforms
from tailcache.pipeline.head import mask_padding, padded_width, summarise_logits
from tailcache.pipeline.load_teacher import load_teacher, load_teacher_tokenizer
from tailcache.trainers.divergences import forward_kl
from tailcache.trainers.dkd import dkd
from tailcache.trainers.rs_kd import Draws, draw, rs_kd
from tailcache.trainers.tad import tad
from tailcache.trainers.tails import TAILS
from tailcache.trainers.terms import TeacherTerms, student_terms

NUM_CAPTURES = 1000
CHECKPOINTS = (1, 3, 10, 32, 100, 316, 1000)
SPLIT, BETA, NUM_DRAWS, POWER = 4, 2.0, 8, 0.5
LOSSES = ("kd", "tad", "dkd", "rs_kd")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Teacher and student at T positions, in full, and the captures.

    Attributes:
      teacher_logits: [T, V] float64.
      student_logits: [T, V] float64.
      next_tokens: [T].
      segments: [T].
      captured: what each capture stores, with the draws of all of them side by side: [T, R m].
      num_samples: m.
    """

    teacher_logits: Tensor
    student_logits: Tensor
    next_tokens: Tensor
    segments: Tensor
    captured: TeacherTerms
    num_samples: int

    def captures(self, first: int, last: int) -> TeacherTerms:
        """Captures first to last as one teacher with (last - first) m draws."""
        some = slice(first * self.num_samples, last * self.num_samples)
        return replace(self.captured, tail_samples=self.captured.tail_samples[:, some])


def make_problem(
    teacher_logits: Tensor,
    student_logits: Tensor,
    next_tokens: Tensor,
    segments: Tensor,
    *,
    top_k: int,
    num_samples: int,
) -> Problem:
    """Capture the positions many times."""
    num_positions, vocab_size = teacher_logits.shape
    padding = padded_width(vocab_size) - vocab_size
    wide = mask_padding(torch.nn.functional.pad(teacher_logits.float(), (0, padding)), vocab_size)
    positions = np.arange(num_positions)
    samples = []
    for seed in range(NUM_CAPTURES):
        numbers = torch.from_numpy(uniforms(draw_key("test", seed), positions))
        summary = summarise_logits(
            wide.clone(), next_tokens, numbers, vocab_size=vocab_size, top_k=top_k, num_samples=num_samples
        )
        samples.append(summary.tail_samples)
    captured = TeacherTerms(
        vocab_size=vocab_size,
        token_ids=summary.token_ids,
        logprobs=summary.logprobs.double(),
        log_tail=summary.log_tail.double(),
        tail_entropy=summary.tail_entropy.double(),
        tail_samples=torch.cat(samples, dim=-1),
        log_target=summary.log_target.double(),
        log_not_target=summary.log_not_target.double(),
        next_tokens=next_tokens,
    )
    return Problem(
        teacher_logits=wide[:, :vocab_size].double(),
        student_logits=student_logits.double(),
        next_tokens=next_tokens,
        segments=segments,
        captured=captured,
        num_samples=num_samples,
    )


def _distinct(problem: Problem) -> Tensor:
    """[T] how many of a capture's draws are different points."""
    return num_distinct(problem.captured.log_tail.exp(), problem.num_samples)


def _rs_kd_draws(problem: Problem) -> list[Draws]:
    """Draws of every capture, each with a generator of its own; columns point into that capture's samples."""
    return [
        draw(problem.captures(r, r + 1), NUM_DRAWS, POWER, torch.Generator().manual_seed(r))
        for r in range(NUM_CAPTURES)
    ]


def _merged(draws: list[Draws], top_k: int, num_samples: int) -> Draws:
    """The draws of several captures as those of one, whose samples lie side by side."""
    columns = [d.columns + (d.columns >= top_k) * r * num_samples for r, d in enumerate(draws)]
    weights = torch.cat([d.weights for d in draws], dim=-1) / len(draws)
    return Draws(columns=torch.cat(columns, dim=-1), weights=weights)


def _gradients(
    problem: Problem, first: int, last: int, draws: list[Draws], losses: tuple[str, ...] = LOSSES, tail: str = "sampled"
) -> dict[str, Tensor]:
    """[T, V] of each loss, averaged over captures first to last, through the terms and autograd."""
    teacher = problem.captures(first, last)
    logits = problem.student_logits.clone().requires_grad_()
    fills = {tail: torch.ones(teacher.vocab_size, dtype=torch.float64)} if tail != "sampled" else {}
    student = student_terms(logits, teacher, fills=fills)
    function = TAILS[tail]
    gradients = {}
    for name in losses:
        if name == "kd":
            value = forward_kl(teacher, student, function)
        elif name == "tad":
            value = tad(teacher, student, function, top_k=SPLIT, beta=BETA, segments_T=problem.segments)
        elif name == "dkd":
            value = dkd(teacher, student, function, target_weight=1.0, non_target_weight=2.0)
        else:
            merged = _merged(draws[first:last], teacher.top_k, problem.num_samples)
            value = rs_kd(teacher, student, merged)
        (gradients[name],) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
    return gradients


def _exact(problem: Problem) -> dict[str, Tensor]:
    """The dense gradients: q - p; TAD's eq. 6; TCKD's and NCKD's."""
    p, q = problem.teacher_logits.softmax(-1), problem.student_logits.softmax(-1)
    kl = q - p
    tail = torch.ones_like(p, dtype=torch.bool).scatter(-1, problem.captured.token_ids[:, :SPLIT], False)
    alpha, alpha_s = (p * tail).sum(-1, keepdim=True), (q * tail).sum(-1, keepdim=True)
    means = [alpha[problem.segments == segment].mean() for segment in problem.segments]
    beta_x = BETA / torch.stack(means)[:, None]
    eq_6 = kl + tail * (beta_x - 1) * (q * alpha / alpha_s - p)
    is_y = torch.zeros_like(p).scatter(-1, problem.next_tokens[:, None], 1.0)
    p_hat, q_hat = (x * (1 - is_y) / (x * (1 - is_y)).sum(-1, keepdim=True) for x in (p, q))
    at_y = (kl * is_y).sum(-1, keepdim=True)
    tckd = at_y * is_y - at_y * q_hat
    return {"kd": kl, "tad": eq_6, "dkd": tckd + 2 * (q_hat - p_hat), "rs_kd": kl}


def _errors(problem: Problem, draws: list[Draws], tail: str = "sampled") -> dict[str, list[float]]:
    """Root mean square over up to 8 groups of R captures of the error pooled over positions and ids, per checkpoint."""
    exact = _exact(problem)
    losses = LOSSES if tail == "sampled" else ("kd", "tad", "dkd")
    errors: dict[str, list[float]] = {name: [] for name in losses}
    for num in CHECKPOINTS:
        groups = min(8, NUM_CAPTURES // num)
        squares = dict.fromkeys(losses, 0.0)
        for group in range(groups):
            for name, found in _gradients(problem, group * num, (group + 1) * num, draws, losses, tail).items():
                squares[name] += (found - exact[name]).square().sum().item() / groups
        for name in losses:
            errors[name].append(math.sqrt(squares[name]))
    return errors


def _slope(errors: list[float]) -> float:
    """Least squares of log error on log R."""
    return float(np.polyfit(np.log(CHECKPOINTS), np.log(errors), 1)[0])


@pytest.fixture(scope="module")
def synthetic() -> Problem:
    """40 positions, V = 100: random, Zipfian and flat teachers; y likely at some, in the tail at others.

    The random ones are flat to peaked, so that 1, 2, 3 and 6 of the 6 draws are different.
    """
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn((40, 100), generator=generator, dtype=torch.float64)
    ranks = torch.stack([torch.randperm(100, generator=generator) for _ in range(40)])
    peaked = torch.linspace(2, 8, 14, dtype=torch.float64)[:, None] * normal[:14]
    teacher = torch.cat([peaked, (-1.2 * (ranks + 1).double().log() + 0.1 * normal)[14:28], 0.1 * normal[28:]])
    student = teacher + 0.7 * torch.randn((40, 100), generator=generator, dtype=torch.float64)
    next_tokens = torch.randint(100, (40,), generator=generator)
    next_tokens[::2] = teacher.argmax(-1)[::2]
    problem = make_problem(teacher, student, next_tokens, torch.arange(40) // 10, top_k=6, num_samples=6)
    assert set(_distinct(problem).tolist()) == {1, 2, 3, 6}
    return problem


@pytest.fixture(scope="module")
def synthetic_draws(synthetic: Problem) -> list[Draws]:
    return _rs_kd_draws(synthetic)


def test_captures_averaged_are_one_capture_of_all_their_draws(synthetic: Problem, synthetic_draws: list[Draws]) -> None:
    together = _gradients(synthetic, 4, 7, synthetic_draws)
    single = [_gradients(synthetic, r, r + 1, synthetic_draws) for r in range(4, 7)]
    for name in LOSSES:
        assert_close(together[name], torch.stack([each[name] for each in single]).mean(0), FLOAT64)


def test_captures_are_independent_and_the_exact_gradients_those_of_a_cache_that_stores_everything(
    synthetic: Problem,
) -> None:
    first, second = synthetic.captures(0, 1).tail_samples, synthetic.captures(1, 2).tail_samples
    assert not torch.equal(first, second)
    logprobs, ids = synthetic.teacher_logits.log_softmax(-1).sort(dim=-1, descending=True)
    whole = replace(
        synthetic.captured,
        token_ids=ids,
        logprobs=logprobs,
        log_tail=torch.full((40,), -math.inf, dtype=torch.float64),
        tail_samples=ids[:, :0],
    )
    everything = replace(synthetic, captured=whole, num_samples=0)
    for name, found in _gradients(everything, 0, 1, [], ("kd", "tad", "dkd")).items():
        assert_close(found, _exact(synthetic)[name], FLOAT32)  # log p_y and log(1 - p_y) come from a float32 capture


def test_gradients_of_synthetic_distributions_converge(synthetic: Problem, synthetic_draws: list[Draws]) -> None:
    for name, errors in _errors(synthetic, synthetic_draws).items():
        assert abs(_slope(errors) + 0.5) <= SLOPE, (name, errors)


def test_no_component_of_the_mean_is_off_by_more_than_its_spread(
    synthetic: Problem, synthetic_draws: list[Draws]
) -> None:
    exact = _exact(synthetic)
    found = [_gradients(synthetic, r, r + 10, synthetic_draws) for r in range(0, NUM_CAPTURES, 10)]
    # An id that is drawn a few times in all has no spread to be measured by.
    p = synthetic.teacher_logits.softmax(-1)
    drawn = NUM_CAPTURES * _distinct(synthetic)[:, None] * p / synthetic.captured.log_tail.exp()[:, None]
    often = drawn >= 50
    assert often.float().mean() > 0.4
    with_y = often & often.gather(
        -1, synthetic.next_tokens[:, None]
    )  # DKD leaves draws of y out, which shows at all ids
    assert with_y.float().mean() > 0.3
    for name in LOSSES:
        each = torch.stack([gradients[name] for gradients in found])
        error, spread = each.mean(0) - exact[name], each.std(0) / len(found) ** 0.5
        # Float32 targets are off by up to 1e-6, and ids of the top-K have no spread at all.
        assert (error.abs() <= SIGMAS * spread + 1e-6)[with_y if name == "dkd" else often].all(), name


def test_a_fixed_fill_does_not_converge(synthetic: Problem) -> None:
    for name, errors in _errors(synthetic, [], "uniform").items():
        assert abs(_slope(errors)) < 1e-6, name


@pytest.fixture(scope="module")
def real(smollm2_folder: Path) -> Problem:
    """24 positions of SmolLM2 in a docstring; the student is SmolLM2 without context: it sees one token only."""
    teacher = load_teacher(str(smollm2_folder), vocab_size=49152)
    tokenizer = load_teacher_tokenizer(str(smollm2_folder))
    assert tokenizer is not None
    tokens = torch.tensor(tokenizer(json.__doc__)["input_ids"][:25])
    with torch.no_grad():
        hidden = teacher.hidden(tokens[None, :24])[0]
        alone = teacher.hidden(tokens[:24, None])[:, 0]
        logits = [teacher.logits(states)[:, :49152].clone() for states in (hidden, alone)]
    return make_problem(logits[0], logits[1], tokens[1:], torch.arange(24) // 12, top_k=16, num_samples=16)


@pytest.mark.slow
def test_gradients_of_a_real_teacher_converge(real: Problem) -> None:
    for name, errors in _errors(real, _rs_kd_draws(real)).items():
        assert abs(_slope(errors) + 0.5) <= SLOPE, (name, errors)
