"""Reading one stage's tensors out of a checkpoint's safetensors, through transformers' own conversions of keys.

The model is made on the meta device and pruned before anything is read; tensors come one by one, in the dtype they are
to have. Nothing is downloaded here, and no forward runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from mqinfer.errors import PlanError
from mqinfer.plan import DTYPES, Plan, StageSpec
from mqinfer.pruning import stage_class

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: Rotary encodings that change for a whole forward when one row gets long.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def read_config(folder: Path, plan: Plan) -> PretrainedConfig:
    """The checkpoint's config. Raises: PlanError if it is not what the plan was made for, or can't be served."""
    with _translated(f"{folder} can't be read"):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    text = config.get_text_config()
    facts = {"model_type": config.model_type, "hidden_size": text.hidden_size, "vocab_size": text.vocab_size}
    for name, found in facts.items():
        if found != getattr(plan, name):
            raise PlanError(f"{folder} has {name} {found!r}, the plan was made for {getattr(plan, name)!r}")
    if text.num_hidden_layers != plan.stages[-1].end:
        raise PlanError(f"{folder} has {text.num_hidden_layers} layers, the plan's stages {plan.stages[-1].end}")
    if getattr(config, "quantization_config", None) is not None:
        raise PlanError(f"{folder} is quantized; a checkpoint in {', '.join(DTYPES)} is needed")
    return config


def read_stage(
    config: PretrainedConfig, spec: StageSpec, folder: Path, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    """The family's model with the stage's layers and their weights, on the CPU. Raises: PlanError."""
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    model: PreTrainedModel
    with _quiet(), _translated(f"the weights in {folder} can't be read"), _tensors(folder) as tensors:
        whole: Any = AutoModelForCausalLM._model_mapping[type(config)]
        reader: Any = stage_class(whole, spec)  # its return type changes with output_loading_info
        model, report = reader.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, with their names
            **options,
        )
    _check(report, folder)
    return model


@contextmanager
def _tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Every tensor of the checkpoint by name, to be read when it is asked for.

    Not mapped into memory: what is replaced on disk must not change a model that runs.
    """
    with ExitStack() as opened:
        slices: dict[str, Any] = {}
        for path in _files(folder):
            file: Any = opened.enter_context(safe_open(path, framework="pt", backend="pread"))
            slices.update((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118 - it is no mapping
        yield slices


def _files(folder: Path) -> list[Path]:
    """The checkpoint's files: one, or those that its index names."""
    if not (folder / INDEX_FILE).is_file():
        return [folder / SINGLE_FILE]
    names = sorted(set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()))
    return [folder / Path(name).name for name in names]  # an index from a stranger must not lead out of the folder


def rope_limit(config: PretrainedConfig) -> int | None:
    """Positions up to which the rotary encoding of a row does not depend on the rows beside it; None: all."""
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    limits = [
        rope.get("original_max_position_embeddings") or text.max_position_embeddings
        for rope in (ropes, *(rope for rope in ropes.values() if isinstance(rope, dict)))
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE
    ]
    return min(limits, default=None)


def _check(report: dict[str, Any], folder: Path) -> None:
    if report["missing_keys"]:
        raise PlanError(f"{folder} lacks {_some(report['missing_keys'])}")
    if report["mismatched_keys"]:
        raise PlanError(f"{folder} does not fit its config: {_some(key for key, *_ in report['mismatched_keys'])}")


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise PlanError(f"{what}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports missing keys as a table and progress as a bar; we raise the one and need not the other."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
