"""From logits to what is kept of them: top-K, tail mass, tail entropy, true token, draws from the tail. Pure.

The vocabulary is seen as blocks of 64. Block maxima find the top-K exactly (the K blocks with the largest maxima
hold the K largest logits); block sums are what makes the log-sum-exp accurate (64 float32 terms at a time, the rest
in float64) and what the draws search in (first a block, then a token in it). Nothing is computed as one minus
something: the tail has its own maximum and its own sum, so its mass is right to seven digits at 1e-30 too.

Why not ``log_softmax`` + ``topk`` + ``multinomial``: they take half as long again on a CPU, give less, and float32
``log_softmax`` over 49,152 logits has twenty times the error of normalisation (``scripts/bench_head.py``).

Legend: T positions, V vocabulary padded to a multiple of 64, B blocks of 64, K kept tokens, m draws, n temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tailcache.pipeline.draws import thinned_points

__all__ = ["BLOCK", "MASKED", "HeadSummary", "mask_padding", "padded_width", "summarise_logits", "tail_mass"]

BLOCK = 64
MASKED = -1e30
"""Stands for minus infinity where a logit is taken out: its exponential is 0, and 0 times it is 0, not NaN."""


@dataclass(frozen=True, kw_only=True)
class HeadSummary:
    """What is kept of T distributions; all logs in nats. NaN somewhere in a row means its logits were not finite."""

    token_ids: Tensor
    """[T, K] int64, most likely first."""
    logprobs: Tensor
    """[T, K] float32."""
    log_tail: Tensor
    """[T] float32; -inf where K is the whole vocabulary."""
    tail_entropy: Tensor
    """[T] float32; 0 where K is the whole vocabulary."""
    log_target: Tensor
    """[T] float32."""
    log_not_target: Tensor
    """[T] float32."""
    tail_samples: Tensor
    """[T, m] int64."""
    log_z_tail: Tensor
    """[T, n] float32: log of the sum of p^(1/tau) over all tokens but the top K, p being normalised over the whole
    vocabulary; -inf where K is the whole vocabulary."""


def padded_width(vocab_size: int) -> int:
    """The vocabulary's size rounded up to whole blocks."""
    return -(-vocab_size // BLOCK) * BLOCK


def mask_padding(logits_TV: Tensor, vocab_size: int) -> Tensor:
    """Take the padded rows of a head out, in place: they are no tokens, and zero logits there are phantom mass."""
    logits_TV[:, vocab_size:] = MASKED
    return logits_TV


def summarise_logits(
    logits_TV: Tensor,
    targets_T: Tensor,
    uniforms_T: Tensor,
    *,
    vocab_size: int,
    top_k: int,
    num_samples: int,
    temperatures: tuple[float, ...] = (),
    tail_sum_V: Tensor | None = None,
    scratch_TV: Tensor | None = None,
) -> HeadSummary:
    """Summarise T distributions. The logits are overwritten.

    Args:
      logits_TV: [T, V] float32 logits at temperature 1, contiguous, V a multiple of 64, padding masked.
      targets_T: [T] int64, the true next token.
      uniforms_T: [T] float64 in [0, 1), each position's number, which with its tail's mass decides its draws.
      vocab_size: real tokens; 1 <= top_k <= vocab_size <= V.
      top_k: tokens kept.
      num_samples: m; where K is the whole vocabulary there is no tail, and nothing is drawn.
      temperatures: n further temperatures tau at which the tail is summed.
      tail_sum_V: [V] float64, to which the sum of the T normalised tails is added; none to skip it.
      scratch_TV: [T, V] float32 to work in; none allocates it.

    Returns:
      The summary, on the logits' device. A row with a NaN or infinite logit, or with one so low (below -1e30) that
      it cannot be told from padding, has a NaN in ``tail_entropy``, ``log_tail`` or ``logprobs``; the caller checks,
      so that a GPU need not wait.

    A row's ids, draws among them, have the same bits whatever rows are beside it.

    Cost: about six passes over [T, V], and three for each temperature; keep T * V * 8 bytes within the processor's
    cache.
    """
    num, width = logits_TV.shape
    blocks = width // BLOCK
    if width % BLOCK or not 1 <= top_k <= vocab_size <= width:
        raise ValueError(
            f"expected 1 <= top_k <= vocab_size <= V and V a multiple of {BLOCK}; found top_k {top_k}, "
            f"vocab_size {vocab_size}, V {width}"
        )
    target_logits_T = logits_TV.gather(1, targets_T[:, None])[:, 0].double()
    logits_TBb = logits_TV.view(num, blocks, BLOCK)
    maxima_TB = logits_TBb.amax(-1)
    if top_k < blocks:
        chosen_TK = maxima_TB.topk(top_k, dim=-1, sorted=False).indices
        candidates_TKb = logits_TBb.gather(1, chosen_TK[:, :, None].expand(-1, -1, BLOCK))
        head_TK, place_TK = candidates_TKb.view(num, -1).topk(top_k, dim=-1)
        token_ids_TK = chosen_TK.gather(1, place_TK // BLOCK) * BLOCK + place_TK % BLOCK
        candidates_TKb.view(num, -1).scatter_(1, place_TK, MASKED)
        maxima_TB.scatter_(1, chosen_TK, candidates_TKb.amax(-1))
        tail_max_T = maxima_TB.amax(-1)
        logits_TV.scatter_(1, token_ids_TK, MASKED)
    else:
        head_TK, token_ids_TK = logits_TV.topk(top_k, dim=-1)
        logits_TV.scatter_(1, token_ids_TK, MASKED)
        tail_max_T = logits_TV.amax(-1)

    head_TK = head_TK.double()
    log_head_T = head_TK.logsumexp(-1)
    if top_k == vocab_size:
        log_total_T = log_head_T
        log_tail_T = torch.full_like(log_head_T, -torch.inf)
        tail_entropy_T = torch.zeros_like(log_head_T)
        log_z_tail_Tn = log_tail_T[:, None].expand(-1, len(temperatures))
        lost_T = head_TK[:, -1] <= MASKED
        samples_Tm = targets_T.new_empty((num, 0))
    else:
        logits_TV.sub_(tail_max_T[:, None])
        exp_TV = torch.exp(logits_TV, out=scratch_TV)
        exp_TBb = exp_TV.view(num, blocks, BLOCK)
        cumulative_TB = exp_TBb.sum(-1).double().cumsum(-1)
        lost_T = tail_max_T <= MASKED
        tail_T = cumulative_TB[:, -1]
        unnormalised_T = tail_T.log() + tail_max_T.double()
        log_total_T = torch.logaddexp(log_head_T, unnormalised_T)
        log_tail_T = unnormalised_T - log_total_T
        points_Tm = thinned_points(uniforms_T, tail_mass(log_head_T, unnormalised_T), num_samples)
        samples_Tm = _draw(exp_TBb, cumulative_TB, points_Tm)
        if tail_sum_V is not None:
            tail_sum_V.add_((tail_T.reciprocal().float()[None, :] @ exp_TV)[0])
        weighted_T = _block_sum(exp_TV.mul_(logits_TV))
        tail_entropy_T = tail_T.log() - weighted_T / tail_T
        log_z_tail_Tn = _tempered(logits_TV, temperatures, tail_max_T.double() - log_total_T, exp_TV)

    logprobs_TK = head_TK - log_total_T[:, None]
    log_target_T = target_logits_T - log_total_T
    is_target_TK = token_ids_TK == targets_T[:, None]
    others_TK = torch.cat([logprobs_TK.masked_fill(is_target_TK, -torch.inf), log_tail_T[:, None]], dim=-1)
    in_head_T = is_target_TK.any(-1)
    # Outside the head the true token has at most half of the mass, so log1p loses nothing there.
    outside_T = torch.log1p(-log_target_T.masked_fill(in_head_T, -1.0).exp())
    log_not_target_T = torch.where(in_head_T, others_TK.logsumexp(-1), outside_T)
    return HeadSummary(
        token_ids=token_ids_TK,
        logprobs=logprobs_TK.float(),
        log_tail=log_tail_T.float().masked_fill(lost_T, torch.nan),
        tail_entropy=tail_entropy_T.float(),
        log_target=log_target_T.float(),
        log_not_target=log_not_target_T.float(),
        tail_samples=samples_Tm,
        log_z_tail=log_z_tail_Tn.float().masked_fill(lost_T[:, None], torch.nan),
    )


def tail_mass(log_head_T: Tensor, log_tail_T: Tensor) -> Tensor:
    """[T] the tail's share of head and tail, from the logs of both, float64 and up to a common constant.

    Not from ``logaddexp``, which may round otherwise for the last few rows of a batch: how many of a position's draws
    are different follows from this number, and must not depend on what else is in the batch.
    """
    return (1 + (log_head_T - log_tail_T).exp()).reciprocal()


def _block_sum(values_TV: Tensor) -> Tensor:
    """[T] float64 sums, the first 64 terms at a time in float32."""
    return values_TV.view(len(values_TV), -1, BLOCK).sum(-1).sum(-1, dtype=torch.float64)


def _tempered(shifted_TV: Tensor, temperatures: tuple[float, ...], log_max_T: Tensor, scratch_TV: Tensor) -> Tensor:
    """[T, n] float64, log of the tail's sum of p^(1/tau), from logits less the tail's largest.

    That largest one's own log-probability, divided by tau, is put back afterwards: so at every temperature the largest
    term is 1, and a tail of 1e-30 is summed as well as one of a half.
    """
    log_z_tail_Tn = log_max_T.new_empty((len(shifted_TV), len(temperatures)))
    for i, tau in enumerate(temperatures):
        log_z_tail_Tn[:, i] = _block_sum(torch.div(shifted_TV, tau, out=scratch_TV).exp_()).log() + log_max_T / tau
    return log_z_tail_Tn


def _draw(exp_TBb: Tensor, cumulative_TB: Tensor, points_Tm: Tensor) -> Tensor:
    """Invert the tail's distribution function: a block by its cumulative sum, then a token in the block.

    A token is drawn only if its own mass is positive: the first index whose cumulative sum exceeds the threshold, or,
    where rounding puts the threshold at the very end, the first index that reaches the total. A row whose sums are NaN
    gets some index: that it is no distribution shows in its other fields.
    """

    def search(cumulative: Tensor, threshold: Tensor) -> Tensor:
        found = torch.searchsorted(cumulative, threshold, right=True)
        last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous())
        return torch.minimum(found, last).clamp_(max=cumulative.shape[-1] - 1)

    num, _, _ = exp_TBb.shape
    m = points_Tm.shape[1]
    if m == 0:
        return torch.empty((num, 0), dtype=torch.int64, device=exp_TBb.device)
    thresholds_Tm = points_Tm * cumulative_TB[:, -1:]
    block_Tm = search(cumulative_TB, thresholds_Tm)
    below_Tm = torch.where(block_Tm > 0, cumulative_TB.gather(1, (block_Tm - 1).clamp(min=0)), 0.0)
    mass_Tm = cumulative_TB.gather(1, block_Tm) - below_Tm
    inside_Tmb = exp_TBb.gather(1, block_Tm[:, :, None].expand(-1, -1, BLOCK)).double().cumsum(-1)
    share_Tm = (thresholds_Tm - below_Tm) / mass_Tm
    place_Tm = search(inside_Tmb, (share_Tm * inside_Tmb[..., -1])[..., None])[..., 0]
    return block_Tm * BLOCK + place_Tm
