"""Which loss can be had from which cache with which tail: the one table, and the refusals with their reasons.

Every combination that is not refused here is exact, unbiased, or biased in a way that docs/losses.md names; nothing is
approximated in silence.
"""

from __future__ import annotations

from dataclasses import dataclass

from tailcache.storage.errors import ConfigError

__all__ = ["LOSSES", "SOUND_TAILS", "Stored", "check_sound", "default_tail"]

_LINEAR = ("sampled", "bucket", "prior", "uniform", "exact", "drop", "renormalise")
_BOUNDED = ("bucket", "prior", "uniform", "exact", "drop", "renormalise")
_INFINITE_AT_ZERO = ("bucket", "prior", "uniform", "exact", "drop")

SOUND_TAILS: dict[str, tuple[str, ...]] = {
    "clm": (),
    "kd": _LINEAR,
    "tad": _LINEAR,
    "dkd": _LINEAR,
    "atkd": _LINEAR,  # wrapping dkd; what wraps another divergence has that one's
    "rs_kd": ("sampled",),
    "reverse_kl": _INFINITE_AT_ZERO,
    "todi": _INFINITE_AT_ZERO,
    "jsd": _BOUNDED,
    "skew_kl": _BOUNDED,
    "skew_reverse_kl": _BOUNDED,
    "hidden_cosine": (),
}
"""Loss -> the tail choices it can take, the default first for those linear in the teacher's tail."""

LOSSES = tuple(SOUND_TAILS)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a teacher's cache holds.

    Attributes:
      top_k: K.
      vocab_size: V.
      num_samples: m, tail draws per position.
      temperatures: those at which log Z of the tail is stored.
      hidden_kind: "none", "bf16" or "int8"; "live" where the teacher runs beside the student (``live``).
      mean_tail_support: how many ids the teacher's mean tail gives mass; 0 if there is none.
      num_teachers: how many teachers are mixed; the others are then what all of them have.
    """

    top_k: int
    vocab_size: int
    num_samples: int = 0
    temperatures: tuple[float, ...] = ()
    hidden_kind: str = "none"
    mean_tail_support: int = 0
    num_teachers: int = 1

    @property
    def is_live(self) -> bool:
        """Whether there is a teacher to ask, and not a cache."""
        return self.hidden_kind == "live"

    @property
    def has_tail(self) -> bool:
        """Whether any id lies beyond the stored K."""
        return self.top_k < self.vocab_size


def default_tail(loss: str, temperature: float = 1.0) -> str | None:
    """The tail choice of a loss where none is asked for; None where a loss has no tail.

    `sampled` where it is unbiased, else `bucket`, which beats the prior and uniform fills there.

    Raises:
      ConfigError: there is no such loss.
    """
    tails = _tails_of(loss)
    if not tails:
        return None
    return "sampled" if "sampled" in tails and temperature == 1.0 else "bucket"


def check_sound(
    loss: str,
    tail: str | None,
    temperature: float,
    stored: Stored,
    *,
    skew: float | None = None,
    wraps: str | None = None,
) -> None:
    """Refuse, before any training, what would be wrong or what the cache cannot give.

    Args:
      loss: one of ``LOSSES``.
      tail: the tail choice; None for a loss without a tail.
      temperature: tau; 1 for all but `kd`.
      stored: what the cache holds.
      skew: of `skew_kl` and `skew_reverse_kl`.
      wraps: the divergence that `atkd` wraps; None is `dkd`.

    Raises:
      ConfigError: with the reason, and what to choose or how to capture instead.
    """
    tails = _tails_of(loss)
    if loss == "hidden_cosine":
        _check_hidden("loss 'hidden_cosine'", stored)
        if stored.is_live:
            raise ConfigError(
                "loss 'hidden_cosine': expected the teacher's hidden states in the cache, found a teacher that runs "
                "beside the student and gives distributions only; capture it with --hidden bf16 and train from that"
            )
    if loss == "atkd" and wraps not in (None, "dkd"):
        _check_wrapped(wraps or "")
        loss, tails = wraps or "", _tails_of(wraps or "")
    if stored.num_teachers > 1:
        _check_mixture(loss, tail, temperature, stored)
    if not (temperature > 0 and temperature < float("inf")):
        raise ConfigError(f"temperature: expected a finite number > 0, found {temperature}")
    if temperature != 1.0 and loss != "kd":
        raise ConfigError(
            f"temperature: expected 1 for the loss {loss!r}, found {temperature:g}: only 'kd' has a form at other "
            "temperatures that the cache can give; use 'kd' or drop the temperature"
        )
    if not tails:
        return
    if tail not in tails:
        raise ConfigError(
            f"tail: expected one of {', '.join(tails)} for the loss {loss!r}, found {tail!r}: {_why_not(loss, tail)}"
        )
    if tail == "renormalise" and loss == "skew_reverse_kl" and skew == 0:
        raise ConfigError(
            "tail 'renormalise': the loss 'skew_reverse_kl' with skew 0 is the reverse KL, which is infinite where the "
            "renormalised teacher has no mass and the student has; choose the tail 'bucket' or a skew above 0"
        )
    if tail == "exact":
        _check_hidden("tail 'exact'", stored)
    if not stored.has_tail:
        return
    if temperature != 1.0:
        _check_temperature(tail, temperature, stored)
    if tail == "sampled" and stored.num_samples == 0:
        raise ConfigError(
            f"tail 'sampled': expected at least one stored tail sample per position for the loss {loss!r}, found "
            "m = 0; choose another tail ('bucket') where the loss has one, or capture the teacher again with "
            "--num-samples 16"
        )
    if tail == "prior":
        _check_prior(loss, stored)


def _tails_of(loss: str) -> tuple[str, ...]:
    if loss not in SOUND_TAILS:
        raise ConfigError(f"loss: expected one of {', '.join(LOSSES)}; found {loss!r}")
    return SOUND_TAILS[loss]


def _check_wrapped(wraps: str) -> None:
    wrappable = ("dkd", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "todi")
    if wraps not in wrappable:
        raise ConfigError(f"wraps: expected one of {', '.join(wrappable)} for the loss 'atkd'; found {wraps!r}")


def _why_not(loss: str, tail: str | None) -> str:
    if tail not in _LINEAR:
        return "there is no such tail choice"
    if loss == "rs_kd":
        return "it draws from the teacher, and beyond the top-K the stored draws are all there is to draw from"
    if tail == "sampled":
        return (
            "it is not linear in the teacher's tail. The draws are from p, so a sum over q would need the weights "
            "q / p, whose heavy tails make the estimate useless; take 'bucket', or 'exact' with stored hidden states"
        )
    return (
        "the renormalised teacher has no mass beyond the top-K, the student has, and the loss is infinite there; take "
        "'bucket' (the true tail mass, one atom) or a loss that stays finite (jsd, skew_kl, skew_reverse_kl)"
    )


def _check_hidden(what: str, stored: Stored) -> None:
    if stored.hidden_kind == "none":
        raise ConfigError(
            f"{what}: expected the teacher's hidden states in the cache, found none; capture the teacher again with "
            "--hidden bf16 (or int8)"
        )


def _check_mixture(loss: str, tail: str | None, temperature: float, stored: Stored) -> None:
    what = f"a mixture of {stored.num_teachers} teachers"
    if loss == "hidden_cosine":
        raise ConfigError(f"loss {loss!r}: {what} has no hidden states; train from one teacher, or drop this loss")
    if not stored.has_tail:
        return
    if loss == "rs_kd":
        raise ConfigError(
            f"loss {loss!r}: expected one teacher, found {what}, whose atoms beyond the common ids are not known "
            "one by one; take 'kd', which has the same expectation and less noise"
        )
    if tail in ("drop", "renormalise", "prior", "uniform"):
        raise ConfigError(
            f"tail {tail!r}: expected sampled, bucket or exact for {what}, whose heads differ: what one teacher did "
            "not store another may have, and a tail that is made up or left out would be wrong about ids that are known"
        )
    if temperature != 1.0 and tail != "exact":
        raise ConfigError(
            f"temperature: expected 1, or the tail 'exact', for {what}, found {temperature:g}: p^(1/tau) of a mixture "
            "does not follow from those of its teachers"
        )


def _check_temperature(tail: str, temperature: float, stored: Stored) -> None:
    if tail in ("sampled", "prior", "uniform"):
        raise ConfigError(
            f"tail {tail!r}: expected bucket, drop, renormalise or exact at temperature {temperature:g}: the stored "
            "draws, mean tail and tail entropy are about p at temperature 1, not about p^(1/tau)"
        )
    if tail != "exact" and temperature not in stored.temperatures:
        raise ConfigError(
            f"temperature: expected one of {', '.join(f'{tau:g}' for tau in (1.0, *stored.temperatures))}, found "
            f"{temperature:g}: the share of the top-K at another temperature follows from the sum of p^(1/tau) over "
            f"the whole vocabulary, which is not stored; capture the teacher again with --temperatures {temperature:g}"
        )


def _check_prior(loss: str, stored: Stored) -> None:
    # Any K ids may be a position's top-K, and for dkd the true token is taken out as well: some must be left.
    taken = min(stored.top_k + (loss in ("dkd", "atkd")), stored.vocab_size - 1)
    everywhere = loss in ("reverse_kl", "todi")
    needed = stored.vocab_size if everywhere else taken + 1
    if stored.mean_tail_support < needed:
        reason = "the loss is infinite at an id without mass" if everywhere else "some must be left beyond any top-K"
        raise ConfigError(
            f"tail 'prior': expected a mean tail distribution with mass on at least {needed} of {stored.vocab_size} "
            f"ids for the loss {loss!r} ({reason}), found mass on {stored.mean_tail_support}; choose the tail 'bucket'"
        )
