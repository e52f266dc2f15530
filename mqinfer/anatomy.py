"""Which tensor of a checkpoint belongs to which part of the model, and what each part weighs and costs.

Pure: a transformers config and safetensors headers in, numbers out. No file may be read here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mqinfer.errors import PlanError
from mqinfer.headers import TensorHeader

_LAYER = re.compile(
    r"(?:(?:language_model|model|transformer|gpt_neox|decoder|backbone)\.)*(?:layers|h|blocks)\.(\d+)\."
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_\w+|word_embeddings\w*|wte|wpe|project_in)\.")
_VOCABULARY = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|word_embeddings|wte)\.weight$")
_KEY_OR_VALUE = re.compile(r"\.[kv]_proj\.weight$")
_FUSED = re.compile(r"\.(?:qkv_proj|query_key_value|c_attn|Wqkv)\.weight$")
#: Causal masks and rotary tables that old checkpoints carry along: no parameters.
_BUFFER = re.compile(r"\.(?:attn|attention)\.(?:bias|masked_bias)$|\.inv_freq$")

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_VISITED_EXPERTS = ("num_experts_per_tok", "num_experts_per_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """What one decoder layer holds."""

    parameters: int
    #: Those in matrices that a token is multiplied with; of a mixture's experts only as many as it visits.
    active: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """The parts of a model: counts are of parameters."""

    layers: tuple[LayerFacts, ...]
    #: Of the first stage, besides its layers: embeddings of tokens and positions.
    embedding: int
    #: Of the last stage, besides its layers and the head: the final norm.
    final: int
    #: Of the output head, which is one with the token embedding where `tied`.
    head: int
    tied: bool
    #: Numbers in the keys and values of one token in one layer.
    kv_elements: int
    #: safetensors' name of the dtype that most of the parameters are in, such as "BF16".
    dtype: str

    @property
    def costs(self) -> list[int]:
        """What each layer costs a token that is generated, and one of a prompt, of which there are about as many.

        The last layer pays for the head, where a prompt costs nothing; looking up an embedding is free.
        """
        costs = [2 * layer.active for layer in self.layers]
        costs[-1] += self.head
        return costs

    def parameters(self, first: int, end: int) -> int:
        """Of a stage with the layers [first, end)."""
        begins, ends = first == 0, end == len(self.layers)
        count = sum(layer.parameters for layer in self.layers[first:end])
        count += self.embedding if begins else 0
        count += self.final if ends else 0
        # A tied head is the embedding: one stage that needs both holds it once, two stages hold it each.
        return count + (self.head if ends and not (begins and self.tied) else 0)


def dissect(config: Any, tensors: Mapping[str, TensorHeader]) -> Anatomy:
    """Sort the tensors of a model by its text config. Raises: PlanError where a layer or the embedding has none."""
    parameters = {name: tensor for name, tensor in tensors.items() if not _BUFFER.search(name)}
    outside = {name: tensor.elements for name, tensor in parameters.items() if not _LAYER.match(name)}
    vocabulary = sum(count for name, count in outside.items() if _VOCABULARY.search(name))
    head = sum(count for name, count in outside.items() if _HEAD.search(name))
    if not (vocabulary or head):
        raise PlanError("the checkpoint has no token embedding")
    # A file of a tied model has the shared tensor under either name, or under both.
    tied = bool(getattr(config, "tie_word_embeddings", False)) or not (vocabulary and head)
    embedding = sum(count for name, count in outside.items() if _EMBEDDING.search(name) and not _HEAD.search(name))
    return Anatomy(
        layers=_layers(config, parameters),
        embedding=embedding if vocabulary else embedding + head,
        final=sum(outside.values()) - embedding - head,
        head=(vocabulary or head) if tied else head,
        tied=tied,
        kv_elements=_kv_elements(config, parameters),
        dtype=_dtype(parameters),
    )


def _layers(config: Any, tensors: Mapping[str, TensorHeader]) -> tuple[LayerFacts, ...]:
    held: Counter[int] = Counter()
    active: Counter[int] = Counter()
    for name, tensor in tensors.items():
        if match := _LAYER.match(name):
            held[int(match[1])] += tensor.elements
            active[int(match[1])] += _active(config, name, tensor)
    # Layers beyond the config's (multi-token prediction) are never loaded.
    for layer in range(config.num_hidden_layers):
        if not held[layer]:
            raise PlanError(f"the checkpoint has no tensor of layer {layer} of {config.num_hidden_layers}")
    return tuple(LayerFacts(parameters=held[index], active=active[index]) for index in range(config.num_hidden_layers))


def _active(config: Any, name: str, tensor: TensorHeader) -> int:
    if len(tensor.shape) < 2:  # norms and biases are added or multiplied once: no matrix
        return 0
    experts, visited = first_of(config, _EXPERTS) or 1, first_of(config, _VISITED_EXPERTS) or 1
    stacked = len(tensor.shape) == 3 and tensor.shape[0] == experts
    if ".experts." in name or stacked:
        return tensor.elements * min(visited, experts) // experts
    return tensor.elements


def _kv_elements(config: Any, tensors: Mapping[str, TensorHeader]) -> int:
    """Of the first layer: as transformers caches it, which the shapes of the projections tell best."""
    heads: int = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # latent attention is cached as plain heads
        return heads * int(config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    queries = heads * (first_of(config, ("head_dim",)) or int(config.hidden_size) // heads)
    if getattr(config, "new_decoder_architecture", False):  # Falcon repeats its few key heads before it caches them
        return 2 * queries
    first = [(name, tensor) for name, tensor in tensors.items() if (match := _LAYER.match(name)) and match[1] == "0"]
    apart = sum(tensor.shape[0] for name, tensor in first if _KEY_OR_VALUE.search(name))
    fused = sum(max(tensor.shape) for name, tensor in first if _FUSED.search(name))
    return apart or (fused - queries if fused else 2 * queries)


def _dtype(tensors: Mapping[str, TensorHeader]) -> str:
    elements: Counter[str] = Counter()
    for tensor in tensors.values():
        elements[tensor.dtype] += tensor.elements
    return elements.most_common(1)[0][0]


def first_of(config: Any, names: Sequence[str]) -> int | None:
    """The first of these attributes that the config has; families call the same thing differently."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
