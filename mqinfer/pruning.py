"""A family's own model, reduced to the layers of one stage before any weight is read.

Layers that the stage does not own give way to stand-ins, so that embeddings, positions, masks and soft-caps keep coming
from the family's own forward. Neither files nor keys and values are known here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mqinfer.errors import PlanError
from mqinfer.plan import StageSpec


class StageEnd(Exception):
    """The forward came to the layer behind the stage's last."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Ports:
    """Where a forward is fed and tapped, from outside of the family's code."""

    def __init__(self) -> None:
        #: What the stage's first layer gets in place of what comes from the stand-ins: [batch, tokens, hidden_size].
        self.hidden: Tensor | None = None
        #: Positions of all the batch's tokens, row after row, that go through the head: int64 [n].
        self.keep: Tensor | None = None

    def feed(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the first layer."""
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": self.hidden}
        return (self.hidden, *args[1:]), kwargs

    def tap(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Forward pre-hook of the head: the head costs as much as many layers, so only what is sampled goes through."""
        hidden = args[0].reshape(1, -1, args[0].shape[-1])
        return (hidden[:, self.keep], *args[1:])


class SkippedLayer(nn.Module):
    """In place of a layer before the stage: what it returns is replaced at the stage's first layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        _copy_plain(layer, self)

    def forward(self, hidden_states: Any, *_: Any, **__: Any) -> tuple[Any]:
        """A tuple, since some families take the first item and the others don't look at it."""
        return (hidden_states,)


class EndLayer(nn.Module):
    """In place of a layer behind the stage."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        _copy_plain(layer, self)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> None:
        """Raises: StageEnd."""
        raise StageEnd(hidden_states)


class NoEmbedding(nn.Module):
    """In place of the token embedding where a stage gets hidden states: the right shape, no weights."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        weight: Any = embedding.weight
        self._dim: int = weight.shape[1]
        self._dtype: torch.dtype = weight.dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, tokens] -> zeros [batch, tokens, dim] that take no memory."""
        return torch.zeros((), dtype=self._dtype, device=input_ids.device).expand(*input_ids.shape, self._dim)


def stage_class(whole: type[PreTrainedModel], spec: StageSpec) -> type[PreTrainedModel]:
    """`whole` with all but the stage's layers gone as soon as it is made; transformers loads it like any model."""

    def init(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, config, *args, **kwargs)
        prune(self, spec)

    body = {"__init__": init, "__module__": whole.__module__, "_keys_to_ignore_on_load_unexpected": [".*"]}
    return type(whole.__name__, (whole,), body)  # the name decides which checkpoint keys are converted


def prune(model: PreTrainedModel, spec: StageSpec) -> None:
    """Take away what the stage does not own. Raises: PlanError."""
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        if index < spec.first:
            layers[index] = SkippedLayer(layer)
        elif index >= spec.end:
            layers[index] = EndLayer(layer)
    _prune_ends(model, is_first=spec.first == 0, is_last=spec.end == len(layers))
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    model.all_tied_weights_keys = {
        target: source for target, source in model.all_tied_weights_keys.items() if {target, source} <= names
    }


def _prune_ends(model: PreTrainedModel, *, is_first: bool, is_last: bool) -> None:
    """Embedding and head stay together where they are one tensor: a checkpoint has it under either name."""
    embedding, head = model.get_input_embeddings(), head_of(model)
    tied = f"{_name_of(model, head)}.weight" in model.all_tied_weights_keys
    if not is_first and not (tied and is_last):
        _replace(model, embedding, NoEmbedding(embedding))
    if not is_last and not (tied and is_first):
        _replace(model, head, nn.Identity())


def release_embedding(model: PreTrainedModel) -> None:
    """Give up the embedding of a stage behind the first, once the head that it was tied to has a weight of its own."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, NoEmbedding):
        _replace(model, embedding, NoEmbedding(embedding))


def release_head(model: PreTrainedModel) -> None:
    """Give up the head of a stage before the last, which is still there where it is tied to the embedding."""
    head = head_of(model)
    if not isinstance(head, nn.Identity):
        _replace(model, head, nn.Identity())


def connect(model: PreTrainedModel, spec: StageSpec) -> Ports:
    """Put the hooks on a pruned model that has its weights."""
    ports = Ports()
    layers = decoder_layers(model)
    if spec.first > 0:
        layers[spec.first].register_forward_pre_hook(ports.feed, with_kwargs=True)
    if spec.end == len(layers):
        head_of(model).register_forward_pre_hook(ports.tap)
    return ports


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, the only list of modules as long as the config says. Raises: PlanError."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outermost = [m for name, m in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if len(outermost) != 1:
        raise PlanError(f"{type(model).__name__} has {len(outermost)} lists of {count} layers, one is needed")
    return outermost[0]


def head_of(model: PreTrainedModel) -> nn.Module:
    """The layer that makes logits of hidden states."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def _copy_plain(source: nn.Module, target: nn.Module) -> None:
    """Forwards read facts such as `attention_type` off a layer."""
    for name, value in vars(source).items():
        if not name.startswith("_") and isinstance(value, str | int | float | None):
            setattr(target, name, value)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    parent, _, name = _name_of(model, old).rpartition(".")
    setattr(model.get_submodule(parent), name, new)
