"""Logits to tokens: greedy, or drawn after temperature, top-k and top-p exactly as transformers warps them.

A row's token depends on its logits, its settings and its position alone, never on the rows beside it: a replay in any
other batch draws the same. When an answer ends is the coordinator's business.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mqinfer.errors import ComputeError
from mqinfer.messages import Sampling, TokenLogprob

#: Below this a temperature means greedy: logits divided by it would leave float32.
GREEDY_BELOW = 1e-5

#: How many of the likeliest tokens are sorted at first: 32 rows of 49,152 with top-p take 20 ms instead of 158 ms.
CANDIDATES = 512

#: Sums of float32 probabilities may differ by so much with the order of adding.
_ROUNDING = 2e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The next token of a row."""

    token: int
    #: Where the row asked for it: of the model's own distribution, before any warping.
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Which tokens of each row may be drawn."""

    #: [rows, 1]: only the so many likeliest tokens, and those as likely as the last of them; 0 means all.
    top_k: Tensor
    #: [rows, 1], float64: of these only the fewest whose probability together reaches this; 1 means all.
    top_p: Tensor

    def __getitem__(self, rows: Tensor) -> Limits:
        return Limits(top_k=self.top_k[rows], top_p=self.top_p[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortlist:
    """The likeliest tokens of each row: likelier first, of equally likely ones the lower number first."""

    #: [rows, width]
    tokens: Tensor
    #: [rows, width]
    logits: Tensor
    #: [rows]: how many of them, from the first, may be drawn.
    kept: Tensor


class Sampler:
    """Draws the next token of every row of a step."""

    def __init__(self, candidates: int = CANDIDATES) -> None:
        self._candidates = candidates

    def sample(self, logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[Drawn]:
        """One token a row. `logits`: [rows, vocabulary], float32; `positions`: of the tokens to be drawn.

        Raises: ComputeError where logits are NaN or infinite.
        """
        if not samplings:
            return []
        likeliest, tokens = logits.max(dim=-1)
        if not bool(torch.isfinite(likeliest).all()):
            raise ComputeError("the model's logits are not finite")
        free = [row for row, sampling in enumerate(samplings) if sampling.temperature >= GREEDY_BELOW]
        limited = [row for row in free if samplings[row].top_k or samplings[row].top_p < 1]
        plain = [row for row in free if row not in limited]
        for rows, draw in ((limited, self._draw_limited), (plain, _draw_plain)):
            if rows:
                chances = [uniform(samplings[row].seed, positions[row]) for row in rows]
                tokens[rows] = draw(logits[rows], [samplings[row] for row in rows], chances)
        logprobs = _logprobs(logits, tokens, samplings)
        return [Drawn(token=token, logprob=logprob) for token, logprob in zip(tokens.tolist(), logprobs, strict=True)]

    def _draw_limited(self, logits: Tensor, samplings: Sequence[Sampling], chances: Sequence[float]) -> Tensor:
        warm, chance = _warm(logits, samplings), _column(chances, logits)
        limits = Limits(
            top_k=_column([sampling.top_k for sampling in samplings], logits, torch.int64),
            top_p=_column([sampling.top_p for sampling in samplings], logits, torch.float64),
        )
        quick, sure = quick_shortlist(warm, limits, self._candidates)
        tokens = _pick(quick, chance)
        if not bool(sure.all()):
            tokens[~sure] = _pick(exact_shortlist(warm[~sure], limits[~sure]), chance[~sure])
        return tokens


def uniform(seed: int, position: int) -> float:
    """A number of [0, 1) that depends on nothing but the seed and the position, each less than 2**63."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8, person=b"mqinfer.draw").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def exact_shortlist(logits: Tensor, limits: Limits) -> Shortlist:
    """All tokens sorted, then transformers' arithmetic to the letter. `logits`: [rows, vocabulary], after temperature.

    Its TopKLogitsWarper keeps ties of the last token; its TopPLogitsWarper adds up from the least likely token, and
    which of equally likely ones it keeps is left to an unstable sort: here those of the lower numbers, as in greedy.
    """
    ordered = logits.sort(dim=-1, descending=True, stable=True)
    size = logits.shape[-1]
    width = torch.where(limits.top_k > 0, limits.top_k.clamp(max=size), size)
    kept = ordered.values >= ordered.values.gather(-1, width - 1)
    ascending = ordered.values.masked_fill(~kept, -torch.inf).flip(-1)
    in_nucleus = ascending.softmax(dim=-1).cumsum(dim=-1).flip(-1) > (1 - limits.top_p).to(logits.dtype)
    kept &= in_nucleus | (limits.top_p >= 1)
    return Shortlist(tokens=ordered.indices, logits=ordered.values, kept=kept.sum(dim=-1).clamp(min=1))


def quick_shortlist(logits: Tensor, limits: Limits, candidates: int) -> tuple[Shortlist, Tensor]:
    """The same from the likeliest `candidates` only, and for which rows ([rows], bool) it is sure to be the same."""
    tokens, values = _likeliest(logits, candidates)
    whole = values.shape[-1] == logits.shape[-1]
    has_k, has_p = limits.top_k > 0, limits.top_p < 1
    last = values.gather(-1, limits.top_k.clamp(min=1, max=values.shape[-1]) - 1)
    in_k = ~has_k | (values >= last)
    weights = (values - values[:, :1]).double().exp() * in_k
    everything = (logits - values[:, :1]).exp().sum(dim=-1, keepdim=True).double()
    total = torch.where(has_k, weights.sum(dim=-1, keepdim=True), everything)
    before = (weights.cumsum(dim=-1) - weights) / total
    kept = (in_k & (~has_p | (before < limits.top_p))).sum(dim=-1, keepdim=True).clamp(min=1)
    # Where the last that counts is as likely as the last candidate, others as likely may be no candidates.
    inside = torch.where(has_k, last, values.gather(-1, kept - 1)) > values[:, -1:]
    doubtful = (has_p & in_k & ((before - limits.top_p).abs() < _ROUNDING)).any(dim=-1, keepdim=True)
    fits = (limits.top_k <= values.shape[-1]) & (inside | whole)
    return Shortlist(tokens=tokens, logits=values, kept=kept[:, 0]), (fits & ~doubtful)[:, 0]


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens and logits in a shortlist's order."""
    tokens = logits.topk(min(count, logits.shape[-1]), dim=-1).indices.sort(dim=-1).values
    order = logits.gather(-1, tokens).sort(dim=-1, descending=True, stable=True)
    return tokens.gather(-1, order.indices), order.values


def _draw_plain(logits: Tensor, samplings: Sequence[Sampling], chances: Sequence[float]) -> Tensor:
    return _inverse_cdf(_warm(logits, samplings), _column(chances, logits))


def _warm(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    return logits / _column([sampling.temperature for sampling in samplings], logits)


def _pick(shortlist: Shortlist, chance: Tensor) -> Tensor:
    beyond = torch.arange(shortlist.logits.shape[-1], device=chance.device) >= shortlist.kept[:, None]
    places = _inverse_cdf(shortlist.logits.masked_fill(beyond, -torch.inf), chance)
    return shortlist.tokens.gather(-1, places[:, None])[:, 0]


def _inverse_cdf(logits: Tensor, chance: Tensor) -> Tensor:
    """The place in each row ([rows]) where the sum of probabilities, from the first on, passes the chance.

    The sum runs in order, so that columns of no weight behind the last change nothing. float32: double takes 15 ms
    more for 32 rows of 49,152, for tokens less likely than one in ten million.
    """
    sums = (logits - logits.amax(dim=-1, keepdim=True)).exp().cumsum(dim=-1)
    total = sums[:, -1:]
    below = torch.minimum(chance * total, total.nextafter(torch.zeros_like(total)))  # the product may be rounded up
    return torch.searchsorted(sums, below, right=True)[:, 0]


def _logprobs(logits: Tensor, tokens: Tensor, samplings: Sequence[Sampling]) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(samplings)
    rows = [row for row, sampling in enumerate(samplings) if sampling.logprobs >= 0]
    if not rows:
        return found
    every = logits[rows].log_softmax(dim=-1)
    drawn = every.gather(-1, tokens[rows, None])[:, 0].tolist()
    top = every.topk(min(max(samplings[row].logprobs for row in rows), every.shape[-1]), dim=-1)
    for row, logprob, likeliest, values in zip(rows, drawn, top.indices.tolist(), top.values.tolist(), strict=True):
        alternatives = tuple(zip(likeliest, values, strict=True))[: samplings[row].logprobs]
        found[row] = TokenLogprob(token=int(tokens[row]), logprob=logprob, top=alternatives)
    return found


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[rows, 1] on the same device, of the same dtype unless another is named."""
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]
