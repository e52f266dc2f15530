"""Real hidden states of SmolLM2, and what becomes of its answers when they pass something on the way.

The text that the model reads is this repository's documentation.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from demo_model import FOLDER
from local_fleet import ROOT
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import SMALL, Unavailable

HIDDEN_SIZE = 576
#: The layers that a cut model's later stages begin with.
CUTS = (5, 15, 25)
CHUNK_TOKENS = 256
CHUNKS = 2 if SMALL else 9

#: What is done to hidden states [tokens, hidden_size] at a cut.
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Answers:
    """How they differ from the whole model's, over all positions."""

    #: Mean Kullback-Leibler divergence, in nats.
    divergence: float
    #: Share of the positions at which the likeliest token is the same.
    agreement: float


@cache
def model(dtype: str = "float32") -> Any:
    """The whole model. Raises: Unavailable."""
    if not (FOLDER / "config.json").exists():
        raise Unavailable("the demo model is missing: run scripts/setup")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=getattr(torch, dtype))


@cache
def chunks() -> tuple[Tensor, ...]:
    """Token ids [CHUNK_TOKENS], CHUNKS times. Raises: Unavailable."""
    text = "\n".join(path.read_text() for path in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")]))
    tokens = AutoTokenizer.from_pretrained(FOLDER)(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(tokens) < CHUNKS * CHUNK_TOKENS:
        raise Unavailable(f"the documentation has only {len(tokens)} tokens, not {CHUNKS * CHUNK_TOKENS}")
    return tuple(tokens.split(CHUNK_TOKENS)[:CHUNKS])


@cache
@torch.no_grad()
def hidden_states() -> tuple[Tensor, ...]:
    """What passes the cuts in the first chunk: bfloat16 [CHUNK_TOKENS, HIDDEN_SIZE] each. Raises: Unavailable."""
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden.bfloat16())
        return hidden

    with _all_threads(), at_cuts(model(), keep):
        model()(chunks()[0][None])
    if any(hidden.shape != (CHUNK_TOKENS, HIDDEN_SIZE) for hidden in seen):
        raise Unavailable(f"the demo model is another one: its hidden states are {tuple(seen[0].shape)}")
    return tuple(seen)


def decode_rows(count: int) -> Tensor:
    """bfloat16 [count, HIDDEN_SIZE] from the middle cut, as a decode step of so many rows. Raises: Unavailable."""
    return hidden_states()[len(CUTS) // 2][:: CHUNK_TOKENS // count][:count].contiguous()


def forget() -> None:
    """Let go of the model and its answers; what was taken from it stays."""
    model.cache_clear()
    _whole.cache_clear()


@contextmanager
def at_cuts(whole: nn.Module, change: Change) -> Iterator[None]:
    """While open, what enters the layers CUTS is what `change` makes of it."""

    def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (change(inputs[0][0])[None], *inputs[1:])

    hooks = [whole.get_submodule(f"model.layers.{cut}").register_forward_pre_hook(enter) for cut in CUTS]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def answers(change: Change | None, dtype: str = "float32") -> Answers:
    """Of the model in `dtype` with every cut through `change`, against those of the whole one in float32."""
    divergences, agreements = [], []
    with _all_threads():
        for chunk, whole in zip(chunks(), _whole(), strict=True):
            with at_cuts(model(dtype), change or (lambda hidden: hidden)):
                other = _likelihoods(dtype, chunk)
            divergences.append((whole.exp() * (whole - other)).sum(-1).mean().item())
            agreements.append((whole.argmax(-1) == other.argmax(-1)).float().mean().item())
    return Answers(statistics.fmean(divergences), statistics.fmean(agreements))


@cache
def _whole() -> Sequence[Tensor]:
    return [_likelihoods("float32", chunk) for chunk in chunks()]


def _likelihoods(dtype: str, chunk: Tensor) -> Tensor:
    """Logarithms, float32 [CHUNK_TOKENS, vocab_size]."""
    logits: Tensor = model(dtype)(chunk[None]).logits[0]
    return logits.float().log_softmax(-1)


@contextmanager
def _all_threads() -> Iterator[None]:
    """The model may have all cores; what is measured beside it has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
