"""The plan: which model, which weights, which dtype, cut into which stages. A TOML file that a person can edit.

Everything an actor without torch must know of the model stands here too, so that a coordinator never reads a
checkpoint. No torch and no RabbitMQ may be imported here; reading checkpoints is `checkpoint.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from mqinfer.errors import PlanError

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  #: dtype name -> bytes an element


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """The decoder layers [first, end). The first stage embeds too, the last has final norm, head and sampler."""

    first: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All stages of a pipeline."""

    #: The pipeline's name: part of its queues' names.
    name: str
    #: Hugging Face hub id, or path of a local folder.
    model: str
    #: Commit of the hub's repository; "" for a folder.
    revision: str = ""
    dtype: str
    stages: tuple[StageSpec, ...]
    #: Stands for the weights: of a folder a digest over headers and samples of every tensor, of the hub the commit.
    fingerprint: str
    #: transformers' model type, such as "llama".
    model_type: str
    hidden_size: int
    vocab_size: int
    #: The most positions a row may reach.
    context_tokens: int
    #: Tokens that end an answer.
    eos_tokens: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        """16 hex digits that bind model, weights, dtype and cuts; messages of another digest are refused."""
        raise NotImplementedError

    @property
    def itemsize(self) -> int:
        """Bytes of one element of hidden states."""
        return DTYPES[self.dtype]


def dumps(plan: Plan) -> str:
    """The plan as commented TOML."""
    raise NotImplementedError


def loads(text: str) -> Plan:
    """Raises: PlanError that names the key at fault."""
    raise PlanError
