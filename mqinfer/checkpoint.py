"""What a Hugging Face checkpoint is, without reading its weights: where it lies, what it is, the plan for it.

Config and safetensors headers are all that is read, and samples of the weights for a fingerprint. No torch may be
imported here; building a stage out of the weights is `stage_model.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mqinfer import headers, hub, partition
from mqinfer.anatomy import Anatomy, dissect, first_of
from mqinfer.errors import PlanError
from mqinfer.families import VERIFIED
from mqinfer.plan import Plan, StageSpec

#: Taken where a config names no limit, as BLOOM's: the length that BLOOM was trained on.
UNNAMED_CONTEXT_TOKENS = 2048

#: Written by whoever saved the checkpoint last; the model computes the same whatever they say.
_VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """What can be known of a checkpoint without its weights."""

    #: Commit of the hub's repository; "" for a folder.
    revision: str
    #: As in `Plan.fingerprint`.
    fingerprint: str
    #: transformers' model type, such as "llama".
    model_type: str
    hidden_size: int
    vocab_size: int
    #: The most positions that the model was made for.
    context_tokens: int
    #: Tokens that end an answer.
    eos_tokens: tuple[int, ...]
    anatomy: Anatomy


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What one stage of a plan weighs."""

    stage: StageSpec
    parameters: int
    #: In the plan's dtype.
    weight_bytes: int
    #: The stage's share of the pipeline's work: as measured, or of one prompt token and one generated token.
    share: float
    #: In the plan's dtype, for all of the stage's layers.
    kv_bytes_per_token: int


def resolve(model: str, revision: str = "") -> Path:
    """The folder of a checkpoint with its weights; a hub id is downloaded where it is not yet. Raises: PlanError."""
    return _folder(model) or hub.fetch(model, revision, (*hub.SMALL_FILES, *hub.WEIGHTS))


def resolve_tokenizer(model: str, revision: str = "") -> Path:
    """A folder with all of a checkpoint but its weights, for those who only need its tokenizer. Raises: PlanError."""
    return _folder(model) or hub.fetch(model, revision, hub.SMALL_FILES)


def fingerprint(folder: Path) -> str:
    """SHA-256 over the config, the headers of all tensors and samples of their bytes. Raises: PlanError."""
    config = {key: value for key, value in _json(folder / "config.json").items() if key not in _VOLATILE}
    sampled = headers.sample(folder, headers.read_folder(folder))
    return hashlib.sha256(json.dumps([config, sampled], sort_keys=True).encode()).hexdigest()


def verify(folder: Path, plan: Plan) -> None:
    """Raises: PlanError unless the folder holds the weights that the plan was made for."""
    if plan.revision:
        # A snapshot's folder is named after its commit, and the hub's client checks what it downloads.
        if folder.resolve().name != plan.revision:
            raise PlanError(f"{folder} can't be known to be {plan.model} at {plan.revision}: plan the folder itself")
    elif fingerprint(folder) != plan.fingerprint:
        raise PlanError(f"{folder} has other weights or another config than the plan was made for")


def facts(model: str, revision: str = "") -> CheckpointFacts:
    """What the plan and its table need to know of the checkpoint. Raises: PlanError, also for an unverified family."""
    local = _folder(model)
    if local:
        config = _config(local)
        return _facts(local, config, dissect(config.get_text_config(), headers.read_folder(local)))
    commit = hub.commit(model, revision)
    folder = hub.fetch(model, commit, hub.SMALL_FILES)
    config = _config(folder)
    return _facts(folder, config, dissect(config.get_text_config(), hub.headers(model, commit)), commit)


def make_plan(
    model: str,
    *,
    stages: int | None = None,
    cuts: Sequence[int] | None = None,
    dtype: str,
    name: str | None = None,
    revision: str = "",
    found: CheckpointFacts | None = None,
    costs: Sequence[int] | None = None,
) -> tuple[Plan, CheckpointFacts]:
    """Cut the model into `stages` stages of equal cost, or before each of the layers `cuts`. Raises: PlanError.

    Without a name the pipeline is called like the model. `found`: its facts, where they are known already. `costs`:
    what each layer costs, embedding and head with it, where that was measured.
    """
    found = found or facts(model, revision)
    folder = _folder(model)
    plan = Plan(
        name=_slug(model) if name is None else name,
        model=str(folder.resolve()) if folder else model,
        revision=found.revision,
        dtype=dtype,
        stages=tuple(
            StageSpec(first=first, end=end) for first, end in _bounds(costs or found.anatomy.costs, stages, cuts)
        ),
        fingerprint=found.fingerprint,
        model_type=found.model_type,
        hidden_size=found.hidden_size,
        vocab_size=found.vocab_size,
        context_tokens=found.context_tokens,
        eos_tokens=found.eos_tokens,
    )
    return plan, found


def stage_table(plan: Plan, facts: CheckpointFacts, costs: Sequence[int] | None = None) -> list[StageCost]:
    """What each stage weighs, in the order of stages. `costs`: as in `make_plan`."""
    return [_stage_cost(stage, plan.itemsize, facts.anatomy, costs or facts.anatomy.costs) for stage in plan.stages]


def _stage_cost(stage: StageSpec, itemsize: int, anatomy: Anatomy, costs: Sequence[int]) -> StageCost:
    parameters = anatomy.parameters(stage.first, stage.end)
    return StageCost(
        stage=stage,
        parameters=parameters,
        weight_bytes=parameters * itemsize,
        share=sum(costs[stage.first : stage.end]) / sum(costs),
        kv_bytes_per_token=anatomy.kv_elements * itemsize * (stage.end - stage.first),
    )


def _bounds(costs: Sequence[int], stages: int | None, cuts: Sequence[int] | None) -> list[tuple[int, int]]:
    if (stages is None) == (cuts is None):
        raise PlanError("either a number of stages or the cuts must be given")
    if stages is not None:
        try:
            return partition.cut(costs, stages)
        except ValueError as error:
            raise PlanError(str(error)) from error
    layers = len(costs)
    bounds = list(pairwise((0, *(cuts or ()), layers)))
    if any(end <= first for first, end in bounds):
        raise PlanError(f"cuts {list(cuts or ())}: they must rise, and lie between 1 and {layers - 1}")
    return bounds


def _facts(folder: Path, config: Any, anatomy: Anatomy, commit: str = "") -> CheckpointFacts:
    text = config.get_text_config()
    return CheckpointFacts(
        revision=commit,
        fingerprint=commit or fingerprint(folder),
        model_type=config.model_type,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        context_tokens=first_of(text, _CONTEXT) or UNNAMED_CONTEXT_TOKENS,
        eos_tokens=_eos_tokens(folder, text),
        anatomy=anatomy,
    )


def _config(folder: Path) -> Any:
    """transformers' config, which knows the family's defaults. Raises: PlanError, also for an unverified family."""
    raw = _json(folder / "config.json")
    model_type = raw.get("model_type")
    if model_type not in VERIFIED:
        raise PlanError(f"model type {model_type!r} is not verified; these are: {', '.join(sorted(VERIFIED))}")
    if raw.get("quantization_config"):
        raise PlanError(f"{folder} is quantized; a checkpoint in float32, bfloat16 or float16 is needed")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # every config class checks its fields in its own way
        raise PlanError(f"{folder / 'config.json'} can't be used: {error}") from error


def _eos_tokens(folder: Path, config: Any) -> tuple[int, ...]:
    """As `generate` takes them: the generation config's, or else the config's."""
    path = folder / "generation_config.json"
    tokens = _json(path).get("eos_token_id") if path.is_file() else None
    tokens = config.eos_token_id if tokens is None else tokens
    tokens = tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise PlanError(f"{folder}: eos_token_id {tokens} are no tokens")
    return tuple(tokens)


def _folder(model: str) -> Path | None:
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else None


def _slug(model: str) -> str:
    """A pipeline's name made of the model's."""
    return re.sub(r"[^a-z0-9._-]+", "-", Path(model).expanduser().resolve().name.lower())[:63].strip("._-") or "model"


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise PlanError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} can't be read: not JSON") from error
    if not isinstance(value, dict):
        raise PlanError(f"{path} can't be read: not a JSON object")
    return value
