"""What is sound from which cache: every loss times every tail, by the table of the documentation, and the reasons."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tailcache.storage.errors import ConfigError
from tailcache.trainers.soundness import LOSSES, SOUND_TAILS, Stored, check_sound, default_tail

EVERYTHING = Stored(
    top_k=8, vocab_size=37, num_samples=4, temperatures=(2.0,), hidden_kind="bf16", mean_tail_support=37
)
NOTHING = Stored(top_k=8, vocab_size=37)
TAILS = ("bucket", "sampled", "prior", "uniform", "exact", "drop", "renormalise")
# One row per loss, one column per name of TAILS: what docs/losses.md says.
TABLE = {
    "kd": "1111111",
    "tad": "1111111",
    "dkd": "1111111",
    "atkd": "1111111",
    "rs_kd": "0100000",
    "reverse_kl": "1011110",
    "todi": "1011110",
    "jsd": "1011111",
    "skew_kl": "1011111",
    "skew_reverse_kl": "1011111",
}


@pytest.mark.parametrize("loss", TABLE)
def test_the_table(loss: str) -> None:
    for tail, sound in zip(TAILS, TABLE[loss], strict=True):
        assert (tail in SOUND_TAILS[loss]) == (sound == "1")
        if sound == "1":
            check_sound(loss, tail, 1.0, EVERYTHING)
        else:
            with pytest.raises(ConfigError, match=rf"for the loss '{loss}', found '{tail}': "):
                check_sound(loss, tail, 1.0, EVERYTHING)


def test_every_loss_is_in_the_table_and_the_rest_has_no_tail() -> None:
    assert set(LOSSES) == {*TABLE, "clm", "hidden_cosine"}
    for loss in ("clm", "hidden_cosine"):
        assert default_tail(loss) is None
        check_sound(loss, None, 1.0, EVERYTHING)
    check_sound("clm", None, 1.0, NOTHING)


def test_defaults_are_sound_wherever_samples_are_stored() -> None:
    plain = replace(NOTHING, num_samples=4)
    for loss in TABLE:
        tail = default_tail(loss)
        assert tail == ("sampled" if SOUND_TAILS[loss][0] == "sampled" else "bucket")
        check_sound(loss, tail, 1.0, plain)
    assert default_tail("kd", 2.0) == "bucket"


def test_the_reasons() -> None:
    for loss, tail, reason in (
        ("reverse_kl", "sampled", r"not linear in the teacher's tail.*heavy tails.*take 'bucket'"),
        ("todi", "sampled", "heavy tails"),
        ("reverse_kl", "renormalise", "infinite there; take 'bucket'"),
        ("todi", "renormalise", "infinite there"),
        ("rs_kd", "bucket", "the stored draws are all there is to draw from"),
        ("kd", "smooth", "there is no such tail choice"),
        ("kd", None, "there is no such tail choice"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_sound(loss, tail, 1.0, EVERYTHING)
    with pytest.raises(ConfigError, match=r"loss: expected one of clm, kd, tad.*found 'kld'"):
        check_sound("kld", "bucket", 1.0, EVERYTHING)
    with pytest.raises(ConfigError, match="found 'kld'"):
        default_tail("kld")


def test_what_the_cache_must_hold() -> None:
    for loss in ("kd", "tad", "dkd", "atkd", "rs_kd"):
        with pytest.raises(ConfigError, match=r"m = 0; .*--num-samples 16"):
            check_sound(loss, "sampled", 1.0, NOTHING)
    for loss in TABLE:
        if "exact" in SOUND_TAILS[loss]:
            with pytest.raises(ConfigError, match=r"tail 'exact': expected the teacher's hidden states.*--hidden bf16"):
                check_sound(loss, "exact", 1.0, NOTHING)
    with pytest.raises(ConfigError, match=r"loss 'hidden_cosine': expected the teacher's hidden states"):
        check_sound("hidden_cosine", None, 1.0, NOTHING)
    for tail in ("bucket", "uniform", "drop", "renormalise"):
        check_sound("kd", tail, 1.0, NOTHING)


@pytest.mark.parametrize(
    ("loss", "top_k", "needed"),
    [("kd", 8, 9), ("tad", 8, 9), ("jsd", 8, 9), ("dkd", 8, 10), ("atkd", 8, 10), ("dkd", 36, 37), ("todi", 8, 37)],
)
def test_a_mean_tail_must_leave_something_beyond_any_top_k(loss: str, top_k: int, needed: int) -> None:
    stored = replace(EVERYTHING, top_k=top_k)
    check_sound(loss, "prior", 1.0, replace(stored, mean_tail_support=needed))
    with pytest.raises(ConfigError, match=rf"at least {needed} of 37 ids.*found mass on {needed - 1};"):
        check_sound(loss, "prior", 1.0, replace(stored, mean_tail_support=needed - 1))


def test_temperatures() -> None:
    for tail in ("bucket", "drop", "renormalise"):
        check_sound("kd", tail, 2.0, EVERYTHING)
        with pytest.raises(ConfigError, match=r"one of 1, 2, found 3: .*not stored; .*--temperatures 3"):
            check_sound("kd", tail, 3.0, EVERYTHING)
        with pytest.raises(ConfigError, match="--temperatures 2"):
            check_sound("kd", tail, 2.0, NOTHING)
    check_sound("kd", "exact", 3.0, EVERYTHING)
    for tail in ("sampled", "prior", "uniform"):
        with pytest.raises(ConfigError, match=r"about p at temperature 1, not about p\^\(1/tau\)"):
            check_sound("kd", tail, 2.0, EVERYTHING)
    for loss in (*TABLE, "clm", "hidden_cosine"):
        if loss != "kd":
            with pytest.raises(ConfigError, match=rf"temperature: expected 1 for the loss '{loss}', found 2"):
                check_sound(loss, default_tail(loss), 2.0, EVERYTHING)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="temperature: expected a finite number > 0"):
            check_sound("kd", "bucket", temperature, EVERYTHING)


def test_with_every_id_stored_nothing_more_is_needed() -> None:
    whole = Stored(top_k=37, vocab_size=37)
    for loss in TABLE:
        for tail in SOUND_TAILS[loss]:
            if tail != "exact":
                check_sound(loss, tail, 1.0, whole)
    check_sound("kd", "bucket", 3.0, whole)


def test_the_skew_that_is_the_reverse_kl() -> None:
    check_sound("skew_reverse_kl", "renormalise", 1.0, EVERYTHING, skew=0.1)
    check_sound("skew_reverse_kl", "bucket", 1.0, EVERYTHING, skew=0.0)
    check_sound("skew_kl", "renormalise", 1.0, EVERYTHING, skew=0.0)
    with pytest.raises(ConfigError, match="with skew 0 is the reverse KL, which is infinite"):
        check_sound("skew_reverse_kl", "renormalise", 1.0, EVERYTHING, skew=0.0)


def test_atkd_has_the_tails_of_what_it_wraps() -> None:
    check_sound("atkd", "sampled", 1.0, EVERYTHING, wraps="dkd")
    check_sound("atkd", "bucket", 1.0, EVERYTHING, wraps="reverse_kl")
    with pytest.raises(ConfigError, match="heavy tails"):
        check_sound("atkd", "sampled", 1.0, EVERYTHING, wraps="reverse_kl")
    for wraps in ("clm", "atkd", "tad", "kl"):
        with pytest.raises(ConfigError, match=rf"wraps: expected one of dkd, reverse_kl.*found '{wraps}'"):
            check_sound("atkd", "bucket", 1.0, EVERYTHING, wraps=wraps)
