"""The objective: every loss with every tail it can take is what the pure functions say, and every other is refused."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from loss_cases import Tolerance, assert_close, cached, cast
from torch import Tensor

from tailcache.storage.errors import ConfigError, StudentError
from tailcache.trainers import divergences as d
from tailcache.trainers.atkd import group_weights
from tailcache.trainers.atoms import bucket_atoms, filled_atoms, head_atoms
from tailcache.trainers.dkd import dkd, non_target_class_kl, target_atoms, without_target
from tailcache.trainers.linear_head import LinearHead
from tailcache.trainers.loss_config import LossConfig, parameters_of
from tailcache.trainers.objective import Objective
from tailcache.trainers.prepared import Prepared
from tailcache.trainers.soundness import SOUND_TAILS
from tailcache.trainers.tad import tad
from tailcache.trainers.tails import TAILS, bucket, drop, renormalise
from tailcache.trainers.terms import StudentTerms, TeacherTerms, student_terms
from tailcache.trainers.todi import todi

T, V, D, K, M = 9, 23, 6, 5, 4
SEGMENTS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
ROWS = torch.tensor([3, 3, 3, 3, 3, 3, 3, 8, 8])
CLOSE = Tolerance(2e-6, 2e-6)


@dataclass
class Stand:
    """What an objective asks of a teacher of a cache."""

    top_k: int = K
    vocab_size: int = V
    num_samples: int = M
    temperatures: tuple[float, ...] = (2.0,)
    hidden_kind: str = "bf16"
    hidden_width: int = D
    mean_tail: Any = field(default_factory=lambda: np.linspace(1, 2, V, dtype=np.float32))
    weight: Tensor = field(default_factory=lambda: torch.randn((V, D), generator=torch.Generator().manual_seed(0)))

    def head(self) -> Any:
        @dataclass
        class Head:
            weight: Any
            weight_kind: str = "float32"
            bias: Any = None
            scale: float = 0.7
            soft_cap: float | None = 4.0

        return Head(self.weight.numpy())


@dataclass
class Problem:
    """A micro-batch in full: the teacher's hidden states and log-probs, the student's logits, what is stored."""

    teacher: TeacherTerms
    logits: Tensor
    log_p: Tensor
    batch: dict[str, Any]
    stand: Any


def _problem(top_k: int = K) -> Problem:
    stand = Stand(top_k=top_k, num_samples=M if top_k < V else 0)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn((T, D), generator=generator).bfloat16()
    head = LinearHead(weight=stand.weight, vocab_size=V, scale=0.7, soft_cap=4.0)
    log_p = torch.log_softmax(head.logits(hidden.float()).double(), -1)
    next_tokens = torch.randint(V, (T,), generator=generator)
    teacher = cast(cached(log_p, top_k, stand.num_samples, next_tokens, temperatures=(2.0,)), torch.float32)
    batch = {"segments": SEGMENTS, "rows": ROWS, "teacher": {"hidden": hidden.view(torch.uint16)}}
    return Problem(teacher, 2 * torch.randn((T, V), generator=generator), log_p.float(), batch, stand)


def _prepared(problem: Problem, *losses: LossConfig, progress: float = 0.0) -> tuple[Objective, Prepared]:
    objective = Objective.of(1.0, losses, problem.stand).at(progress)
    aids = objective.aids(problem.stand, torch.device("cpu"))
    return objective, objective.prepare(problem.teacher, problem.batch, aids, seed=(0, 7))


def _student(problem: Problem) -> StudentTerms:
    fills = {
        "prior": torch.from_numpy(problem.stand.mean_tail),
        "uniform": torch.ones(V),
        "exact": problem.log_p.exp(),
    }
    return student_terms(problem.logits, problem.teacher, fills=fills, temperatures=(2.0,))


def _atoms(problem: Problem, tail: str) -> tuple[Tensor, Tensor]:
    teacher, student = problem.teacher, _student(problem)
    log_q = torch.log_softmax(problem.logits, -1)
    return {
        "bucket": lambda: bucket_atoms(teacher, student),
        "drop": lambda: head_atoms(drop(teacher), student),
        "renormalise": lambda: bucket_atoms(renormalise(teacher), student),
        "exact": lambda: (problem.log_p, log_q),
        "prior": lambda: (filled_atoms(teacher, torch.from_numpy(problem.stand.mean_tail)), log_q),
        "uniform": lambda: (filled_atoms(teacher, torch.ones(V)), log_q),
    }[tail]()


ON_ATOMS: dict[str, Any] = {
    "reverse_kl": d.reverse_kl,
    "todi": todi,
    "jsd": partial(d.jsd, mixture=0.3),
    "skew_kl": partial(d.skew_kl, skew=0.2),
    "skew_reverse_kl": partial(d.skew_reverse_kl, skew=0.2),
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "tad": {"top_k": 3, "beta": 1.5, "min_mean_alpha": 0.01},
    "dkd": {"target_weight": 0.5, "non_target_weight": 3.0},
    "jsd": {"mixture": 0.3},
    "skew_kl": {"skew": 0.2},
    "skew_reverse_kl": {"skew": 0.2},
}


def _expected(problem: Problem, name: str, tail: str) -> Tensor:
    """[T] from the pure functions."""
    student = _student(problem)
    teacher = {"drop": drop, "renormalise": renormalise}.get(tail, lambda t: t)(problem.teacher)
    function = TAILS.get(tail, bucket)
    if name == "kd":
        return d.forward_kl(teacher, student, function)
    if name == "tad":
        return tad(teacher, student, function, segments_T=SEGMENTS, **PARAMETERS["tad"])
    if name == "dkd":
        return dkd(teacher, student, function, **PARAMETERS["dkd"])
    value: Tensor = ON_ATOMS[name](*_atoms(problem, tail))
    return value


COMBINATIONS = [(name, tail) for name, tails in SOUND_TAILS.items() for tail in tails if name not in ("rs_kd", "atkd")]


@pytest.mark.parametrize(("name", "tail"), COMBINATIONS)
def test_a_part_is_what_the_pure_function_says(name: Any, tail: Any) -> None:
    problem = _problem()
    objective, prepared = _prepared(problem, LossConfig(name=name, tail=tail, **PARAMETERS.get(name, {})))
    values = prepared.of_logits(slice(0, T), problem.logits)
    expected = torch.stack([d.cross_entropy(_student(problem)), _expected(problem, name, tail)], -1)
    assert_close(values, expected, CLOSE)
    # A few positions at a time, as the fused head asks for them.
    pieces = [slice(0, 4), slice(4, 5), slice(5, T)]
    assert_close(torch.cat([prepared.of_logits(p, problem.logits[p]) for p in pieces]), expected, CLOSE)
    if not objective.num_dense:
        student = _student(problem)
        parts = [prepared.of_terms(p, problem.teacher.rows(p), student.rows(p)) for p in pieces]
        assert_close(torch.cat(parts), expected, CLOSE)


@pytest.mark.parametrize("wraps", ["reverse_kl", "todi"])
@pytest.mark.parametrize("tail", ["bucket", "prior", "uniform"])
def test_a_tail_that_is_only_the_true_token_leaves_no_infinite_atoms(wraps: Any, tail: Any) -> None:
    problem = _problem()
    # Rounded, p_y fills the whole tail: nothing is known of the ids beyond the top-K but that it is hardly anything.
    beyond_T = ~problem.teacher.is_target.any(-1)
    assert beyond_T.any()
    log_target_T = torch.where(beyond_T, problem.teacher.log_tail, problem.teacher.log_target)
    problem = replace(problem, teacher=replace(problem.teacher, log_target=log_target_T))
    _, prepared = _prepared(problem, LossConfig(name="atkd", wraps=wraps, tail=tail))
    logits = problem.logits.requires_grad_()
    values = prepared.of_logits(slice(0, T), logits)
    values.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert values.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("tail", ["bucket", "drop", "renormalise", "exact"])
def test_kd_at_another_temperature(tail: Any) -> None:
    problem = _problem()
    _, prepared = _prepared(problem, LossConfig(name="kd", tail=tail, temperature=2.0))
    values = prepared.of_logits(slice(0, T), problem.logits)[:, 1]
    changed = {"renormalise": renormalise}.get(tail, lambda t: t)(problem.teacher)
    if tail == "exact":
        expected = 4 * d.kl(torch.log_softmax(problem.log_p / 2, -1), torch.log_softmax(problem.logits / 2, -1))
    else:
        expected = d.tempered_kl(changed, _student(problem), 2.0, bucket=tail == "bucket")
    assert_close(values, expected, CLOSE)


@pytest.mark.parametrize(("wraps", "tail"), [
    ("dkd", "sampled"), ("dkd", "exact"), ("dkd", "drop"), ("reverse_kl", "bucket"), ("reverse_kl", "exact"),
    ("jsd", "prior"), ("jsd", "drop"), ("skew_kl", "renormalise"), ("skew_reverse_kl", "uniform"), ("todi", "exact"),
])  # fmt: skip
def test_atkd_is_the_weighted_sum_of_its_groups_means(wraps: Any, tail: Any) -> None:
    problem = _problem()
    parameters = {name: value for name, value in PARAMETERS.get(wraps, {}).items() if wraps != "dkd"}
    loss = LossConfig(name="atkd", wraps=wraps, tail=tail, hard_ratio=0.4, easy_weight=0.3, **parameters)
    _, prepared = _prepared(problem, loss)
    values = prepared.of_logits(slice(0, T), problem.logits)[:, 1]
    teacher, student = problem.teacher, _student(problem)
    f = d.kl if wraps == "dkd" else ON_ATOMS[wraps]
    target = f(*target_atoms(teacher, student))
    changed = {"drop": drop, "renormalise": renormalise}.get(tail, lambda t: t)(teacher)
    if wraps == "dkd":
        divergence = non_target_class_kl(changed, student, TAILS.get(tail, bucket))
    elif tail in ("bucket", "renormalise"):
        divergence = f(*bucket_atoms(*without_target(changed, student)))
    elif tail == "drop":
        divergence = f(*head_atoms(*without_target(changed, student)))
    else:  # dense, with the true token taken out by hand
        fills = {"prior": torch.from_numpy(problem.stand.mean_tail), "uniform": torch.ones(V)}
        rows = []
        for t in range(T):
            y = int(teacher.next_tokens[t])
            others = [i for i in range(V) if i != y]
            if tail == "exact":
                log_p = torch.log_softmax(problem.log_p[t, others], 0)
            else:
                head = teacher.token_ids[t].tolist()
                beyond = [i for i in others if i not in head]
                p = torch.zeros(V)
                p[teacher.token_ids[t]] = teacher.logprobs[t].exp()
                rest = float(teacher.log_tail[t].exp()) - (0.0 if y in head else float(teacher.log_target[t].exp()))
                p[beyond] = rest * fills[tail][beyond] / fills[tail][beyond].sum()
                log_p = (p[others] / p[others].sum()).log()
            rows.append(f(log_p[None], torch.log_softmax(problem.logits[t, others], 0)[None])[0])
        divergence = torch.stack(rows)
    _, hard = group_weights(teacher.log_not_target, hard_ratio=0.4, easy_weight=0.3)
    assert 0 < hard.sum() < T
    expected = 0.3 * divergence[~hard].mean() + 0.7 * (target + divergence)[hard].mean()
    assert_close(values.mean(), expected, Tolerance(1e-5, 1e-5))


def test_rs_kd_draws_for_each_row_by_itself_and_anew_at_each_step() -> None:
    problem = _problem()
    loss = LossConfig(name="rs_kd", num_draws=8, power=0.7)
    objective, prepared = _prepared(problem, loss)
    values = prepared.of_logits(slice(0, T), problem.logits)[:, 1]
    aids = objective.aids(problem.stand, torch.device("cpu"))
    second = {**problem.batch, "segments": SEGMENTS[7:], "rows": ROWS[7:]}
    alone = objective.prepare(problem.teacher.rows(slice(7, T)), second, aids, seed=(0, 7))
    assert_close(alone.of_logits(slice(0, 2), problem.logits[7:])[:, 1], values[7:], CLOSE)
    later = objective.prepare(problem.teacher, problem.batch, aids, seed=(0, 8))
    assert not torch.equal(later.of_logits(slice(0, T), problem.logits)[:, 1], values)
    steps = [objective.prepare(problem.teacher, problem.batch, aids, seed=(0, s)) for s in range(1500)]
    student = _student(problem)
    drawn = torch.stack([p.of_terms(slice(0, T), problem.teacher, student)[:, 1] for p in steps])
    error = (drawn.mean(0) - _expected(problem, "kd", "sampled")) / (drawn.std(0) / 1500**0.5)
    assert error.abs().max() < 5


def test_every_id_stored_makes_all_tails_one() -> None:
    problem = _problem(top_k=V)
    dense = torch.log_softmax(problem.logits, -1)
    for name, tails in SOUND_TAILS.items():
        for tail in tails:
            if name in ("atkd", "rs_kd", "tad", "dkd"):
                continue
            loss: Any = {"name": name, "tail": tail, **PARAMETERS.get(name, {})}
            objective, prepared = _prepared(problem, LossConfig(**loss))
            assert not objective.num_dense
            assert objective.optional == ()
            function = d.kl if name == "kd" else ON_ATOMS[name]
            values = prepared.of_logits(slice(0, T), problem.logits)[:, 1]
            assert_close(values, function(problem.log_p, dense), Tolerance(1e-5, 1e-5))


def test_schedules_reach_the_loss() -> None:
    problem = _problem()
    moving = LossConfig(
        name="tad", top_k=1, top_k_end=5, top_k_schedule="linear", beta=1, beta_end=3, beta_schedule="cosine"
    )
    for progress, top_k, beta in ((0.0, 1, 1.0), (0.5, 3, 2.0), (1.0, 5, 3.0)):
        objective, prepared = _prepared(problem, moving, progress=progress)
        assert objective.scheduled == pytest.approx({"beta": beta, "top_k": top_k})
        _, fixed = _prepared(problem, LossConfig(name="tad", top_k=top_k, beta=beta))
        a, b = (p.of_logits(slice(0, T), problem.logits) for p in (prepared, fixed))
        assert_close(a, b, CLOSE)


def test_parts_are_named_and_weighted() -> None:
    stand: Any = Stand()
    kd, tad_ = LossConfig(name="kd", weight=0.5), LossConfig(name="tad", top_k=3)
    cosine, exact = LossConfig(name="hidden_cosine", weight=2.0), LossConfig(name="kd", tail="exact")
    assert Objective.of(1.0, [], stand).names == ("clm",)
    assert Objective.of(1.0, [tad_], stand).names == ("clm", "divergence")
    many = Objective.of(0.3, [cosine, kd, tad_, exact], stand)
    assert many.names == ("clm", "kd", "tad", "kd#2", "hidden_cosine")
    assert many.weights == (0.3, 0.5, 1.0, 1.0, 2.0)
    assert many.scheduled == {"tad_beta": 2.0, "tad_top_k": 3}
    assert [each.tail for each in many.losses] == ["sampled", "sampled", "exact", None]


def test_what_it_needs() -> None:
    stand: Any = Stand()

    def needs(*losses: LossConfig) -> tuple[Any, ...]:
        objective = Objective.of(1.0, losses, stand)
        aids = objective.aids(stand, torch.device("cpu"))
        return (
            objective.optional,
            objective.temperatures,
            objective.num_dense > 0,
            sorted(aids.fills),
            bool(aids.heads),
        )

    assert needs() == ((), (), False, [], False)
    assert needs(LossConfig(name="kd")) == ((), (), False, [], False)
    assert needs(LossConfig(name="tad", tail="prior", top_k=3)) == ((), (), False, ["prior"], False)
    assert needs(LossConfig(name="reverse_kl", tail="uniform")) == ((), (), True, ["uniform"], False)
    assert needs(LossConfig(name="kd", temperature=2.0)) == (("log_z_tail",), (2.0,), False, [], False)
    assert needs(LossConfig(name="kd", temperature=5.0, tail="exact")) == (("hidden",), (), True, [], True)
    assert needs(LossConfig(name="hidden_cosine")) == (("hidden",), (), False, [], False)


BARE: dict[str, Any] = {"num_samples": 0, "temperatures": (), "hidden_kind": "none"}


@pytest.mark.parametrize(
    ("settings", "stored", "message"),
    [
        ({"name": "reverse_kl", "tail": "sampled"}, {}, "not linear in the teacher's tail.*heavy tails"),
        ({"name": "todi", "tail": "sampled"}, {}, "not linear in the teacher's tail"),
        ({"name": "jsd", "tail": "sampled"}, {}, "not linear in the teacher's tail"),
        ({"name": "skew_kl", "tail": "sampled"}, {}, "not linear in the teacher's tail"),
        ({"name": "skew_reverse_kl", "tail": "sampled"}, {}, "not linear in the teacher's tail"),
        ({"name": "atkd", "wraps": "reverse_kl", "tail": "sampled"}, {}, "not linear in the teacher's tail"),
        ({"name": "reverse_kl", "tail": "renormalise"}, {}, "the loss is infinite there"),
        ({"name": "todi", "tail": "renormalise"}, {}, "the loss is infinite there"),
        ({"name": "skew_reverse_kl", "tail": "renormalise", "skew": 0.0}, {}, "infinite where the renormalised"),
        ({"name": "atkd", "wraps": "todi", "tail": "renormalise"}, {}, "the loss is infinite there"),
        ({"name": "kd", "tail": "sampled"}, BARE, "m = 0; choose another tail .*--num-samples"),
        ({"name": "tad", "tail": "sampled", "top_k": 3}, BARE, "m = 0"),
        ({"name": "rs_kd"}, BARE, "m = 0"),
        ({"name": "kd", "tail": "exact"}, BARE, "tail 'exact': .*--hidden bf16"),
        ({"name": "todi", "tail": "exact"}, BARE, "tail 'exact': .*--hidden bf16"),
        ({"name": "hidden_cosine"}, BARE, "loss 'hidden_cosine': .*--hidden bf16"),
        ({"name": "kd", "temperature": 3.0}, {}, "expected one of 1, 2, found 3: .*--temperatures 3"),
        ({"name": "kd", "temperature": 2.0}, BARE, "--temperatures 2"),
        ({"name": "kd", "temperature": 2.0, "tail": "sampled"}, {}, r"not about p\^\(1/tau\)"),
        ({"name": "kd", "temperature": 2.0, "tail": "prior"}, {}, r"not about p\^\(1/tau\)"),
        ({"name": "kd", "temperature": 2.0, "tail": "uniform"}, {}, r"not about p\^\(1/tau\)"),
        ({"name": "kd", "tail": "prior"}, {"mean_tail": np.eye(V)[0]}, "mass on at least 6 of 23 ids"),
        ({"name": "reverse_kl", "tail": "prior"}, {"mean_tail": np.eye(V)[0]}, "infinite at an id without mass"),
        ({"name": "tad", "top_k": 6}, {}, r"1 <= K' <= 5.*found K' = 6"),
        (
            {"name": "tad", "top_k": 2, "top_k_end": 9, "top_k_schedule": "linear"},
            {},
            r"1 <= K' <= 5.*found K' = 9",
        ),
        ({"name": "tad"}, {}, r"1 <= K' <= 5.*found K' = 10"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) and "name" in value else "",
)
def test_what_is_not_sound_is_refused_with_the_reason(
    settings: dict[str, Any], stored: dict[str, Any], message: str
) -> None:
    stand: Any = Stand(**stored)
    with pytest.raises(ConfigError, match=message):
        Objective.of(1.0, [LossConfig(**settings)], stand)


def test_hidden_states_must_be_comparable() -> None:
    stand: Any = Stand()
    cosine = Objective.of(1.0, [LossConfig(name="hidden_cosine")], stand)
    same, other = (LinearHead(weight=torch.zeros(V, width), vocab_size=V) for width in (D, 8))
    cosine.check_student(other)
    assert [cosine.needs_projection(head, stand) for head in (same, other)] == [False, True]
    assert not Objective.of(1.0, [LossConfig(name="kd")], stand).needs_projection(other, stand)
    with pytest.raises(StudentError, match=r"head is a linear layer.*found that its head is odd"):
        cosine.check_student("its head is odd")
    Objective.of(1.0, [LossConfig(name="kd")], stand).check_student("its head is odd")
    with pytest.raises(ConfigError, match="expected hidden_cosine once"):
        Objective.of(1.0, [LossConfig(name="hidden_cosine")] * 2, stand)


# ---- settings ----

VALUES: dict[str, Any] = {
    "tail": "bucket",
    "temperature": 2.0,
    "top_k": 4,
    "top_k_end": 5,
    "top_k_schedule": "linear",
    "beta": 3.0,
    "beta_end": 4.0,
    "beta_schedule": "cosine",
    "min_mean_alpha": 0.1,
    "mixture": 0.4,
    "skew": 0.3,
    "target_weight": 2.0,
    "non_target_weight": 2.0,
    "hard_ratio": 0.3,
    "easy_weight": 0.3,
    "wraps": "jsd",
    "num_draws": 3,
    "power": 0.5,
}


@pytest.mark.parametrize("name", [name for name in SOUND_TAILS if name != "clm"])
def test_parameters_of_other_losses_are_refused(name: Any) -> None:
    for parameter, value in VALUES.items():
        partner: dict[str, dict[str, Any]] = {
            "top_k_end": {"top_k_schedule": "linear"},
            "beta_end": {"beta_schedule": "linear"},
            "top_k_schedule": {"top_k_end": 3},
            "beta_schedule": {"beta_end": 3.0},
        }
        settings = {parameter: value, **partner.get(parameter, {})}
        if parameter in parameters_of(name):
            LossConfig(name=name, **settings)
        else:
            with pytest.raises(ConfigError, match=rf"belongs to .*, and the loss is '{name}'; drop it"):
                LossConfig(name=name, **settings)
    LossConfig(name="atkd", wraps="jsd", mixture=0.4)
    LossConfig(name="atkd", wraps="skew_kl", skew=0.4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "kd", "weight": -1.0}, "weight: expected a number >= 0"),
        ({"name": "kd", "weight": float("nan")}, "weight: expected a number >= 0, found nan"),
        ({"name": "clm"}, "found 'clm'; the cross-entropy's weight is clm_weight"),
        ({"name": "kdd"}, "expected one of kd, tad"),
        ({"name": "kd", "temperature": 0.0}, "temperature: expected a number > 0"),
        ({"name": "tad", "beta": -1.0}, "beta: expected a number >= 0, found -1"),
        ({"name": "tad", "beta": float("nan")}, "beta: expected a number >= 0, found nan"),
        ({"name": "tad", "top_k": 0}, "top_k: expected at least 1"),
        ({"name": "tad", "min_mean_alpha": 2.0}, "min_mean_alpha: expected a number between 0 and 1"),
        ({"name": "tad", "beta_end": 5.0}, "beta_schedule: expected linear or cosine together with beta_end"),
        ({"name": "tad", "top_k_schedule": "linear"}, "top_k_schedule: expected linear or cosine together with"),
        ({"name": "jsd", "mixture": 1.0}, "mixture: expected a number between 0 and 1, both excluded"),
        ({"name": "skew_kl", "skew": 1.0}, "skew: expected a number >= 0 and below 1"),
        ({"name": "atkd", "hard_ratio": 1.5}, "hard_ratio: expected a number between 0 and 1"),
        ({"name": "atkd", "easy_weight": -0.5}, "easy_weight: expected a number between 0 and 1"),
        ({"name": "rs_kd", "num_draws": 0}, "num_draws: expected at least 1"),
        ({"name": "rs_kd", "power": -1.0}, "power: expected a number >= 0"),
        ({"name": "dkd", "target_weight": float("inf")}, "target_weight: expected a number >= 0"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LossConfig(**settings)


def test_defaults_are_filled_in_where_a_tail_fits() -> None:
    stand: Any = Stand()
    on_atoms = ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "todi")
    defaults = {name: "sampled" for name in ("kd", "tad", "dkd", "atkd")} | {name: "bucket" for name in on_atoms}
    defaults["rs_kd"] = None  # type: ignore[assignment]
    for name, tail in defaults.items():
        loss: Any = {"name": name} | ({"top_k": 3} if name == "tad" else {})
        assert Objective.of(1.0, [LossConfig(**loss)], stand).losses[0].tail == tail
    for loss, tail in (
        (LossConfig(name="kd", temperature=2.0), "bucket"),
        (LossConfig(name="atkd", wraps="todi"), "bucket"),
        (replace(LossConfig(name="atkd"), tail="prior"), "prior"),
    ):
        assert Objective.of(1.0, [loss], stand).losses[0].tail == tail
