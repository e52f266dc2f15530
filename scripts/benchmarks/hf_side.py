"""The process of the contender transformers: the whole model, its own `generate`, all cores. See `rival_hf`."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from demo_model import FOLDER
from torch import Tensor
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig

from benchmarks.side import Channel

#: Positions of a page of continuous batching, and new positions of one of its steps at most.
PAGE_TOKENS = 32
STEP_TOKENS = 1024
#: An answer of continuous batching must come within this after the one before.
PATIENCE_S = 600.0


class Whole:
    """The model, loaded."""

    def __init__(self, dtype: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=getattr(torch, dtype))
        config = copy.deepcopy(self._model.generation_config)
        config.do_sample = False
        config.eos_token_id = None  # lengths are forced: no token ends a row, and none is forbidden
        config.pad_token_id = 0
        self._model.generation_config = config

    def generate(self, batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Each batch padded on the left to its longest prompt; all its rows get `output_tokens` tokens."""
        outputs: list[list[int]] = []
        began_s = time.perf_counter()
        for batch in batches:
            tokens, mask = _padded(batch["prompts"])
            drawn = self._model.generate(tokens, attention_mask=mask, max_new_tokens=batch["output_tokens"])
            outputs += drawn[:, tokens.shape[1] :].tolist()
        return {"seconds": time.perf_counter() - began_s, "outputs": outputs}

    @torch.inference_mode()
    def score(self, batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One forward for each batch; the token after each prompt."""
        outputs: list[list[int]] = []
        began_s = time.perf_counter()
        for batch in batches:
            tokens, mask = _padded(batch["prompts"])
            done = self._model(tokens, attention_mask=mask, use_cache=False, logits_to_keep=1)
            outputs += done.logits[:, -1].argmax(-1, keepdim=True).tolist()
        return {"seconds": time.perf_counter() - began_s, "outputs": outputs}

    def continuous(self, rows: Sequence[dict[str, Any]], at_once: int) -> dict[str, Any]:
        """transformers' own continuous batching, `at_once` rows in flight; setting its cache aside is not timed.

        By itself it would take nine tenths of the machine's memory for its cache.
        """
        attention = self._model.config._attn_implementation
        longest = max(len(row["prompt"]) + row["output_tokens"] for row in rows)
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=(at_once + 1) * -(-(longest + 1) // PAGE_TOKENS),
            max_batch_tokens=STEP_TOKENS,
            max_requests_per_batch=at_once,
        )
        try:
            with self._model.continuous_batching_context_manager(
                generation_config=copy.deepcopy(self._model.generation_config),
                continuous_batching_config=config,
                timeout=5,
            ) as manager:
                return _run_continuous(manager, rows)
        finally:
            self._model.set_attn_implementation(attention)


def _run_continuous(manager: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    outputs: dict[str, list[int]] = {}
    began_s = heard_s = time.perf_counter()
    for number, row in enumerate(rows):
        manager.add_request(row["prompt"], request_id=f"row-{number}", max_new_tokens=row["output_tokens"])
    while len(outputs) < len(rows):
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running() or time.perf_counter() - heard_s > PATIENCE_S:
                raise RuntimeError(f"continuous batching stopped after {len(outputs)} of {len(rows)} rows")
            continue
        heard_s = time.perf_counter()
        if result.error is not None:
            raise RuntimeError(result.error)
        if result.is_finished():
            outputs[result.request_id] = list(result.generated_tokens)
    seconds = time.perf_counter() - began_s
    return {"seconds": seconds, "outputs": [outputs[f"row-{number}"] for number in range(len(rows))]}


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return tokens, mask


def main() -> None:
    """Answer until the pipe is closed."""
    channel = Channel()
    whole = Whole(sys.argv[1])
    while (question := channel.read()) is not None:
        match question.pop("op"):
            case "generate":
                channel.write(**whole.generate(**question))
            case "score":
                channel.write(**whole.score(**question))
            case "continuous":
                try:
                    channel.write(**whole.continuous(**question))
                except Exception as error:  # it was made for GPUs: what stops it here is for the report
                    channel.write(unavailable=f"{type(error).__name__}: {error}")
            case other:
                raise ValueError(other)


if __name__ == "__main__":
    main()
