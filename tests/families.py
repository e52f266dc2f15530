"""Tiny random checkpoints of every family that is verified, or is a candidate: a few layers, a small vocabulary.

Their weights are drawn so wide that greedy texts wander; a model that repeats one token would hide most faults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 128
LAYERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """A family's config in small."""

    #: transformers' model type.
    family: str
    #: What differs from the common settings.
    settings: Mapping[str, Any] = field(default_factory=dict)
    #: Common settings that its config does not take.
    without: tuple[str, ...] = ()
    tied: bool = False
    #: Bytes of a file; small ones make several files and an index.
    file_bytes: int = 10**9
    #: What tells it from others of its family.
    variant: str = ""
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.family}-{self.variant}" if self.variant else self.family


COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def save(tiny: Tiny, folder: Path) -> PreTrainedModel:
    """Write the checkpoint; the whole model as transformers runs it by itself.

    With the attention that it chooses: of Falcon with ALiBi the eager one adds the bias twice.
    """
    settings = {name: value for name, value in {**COMMON, **tiny.settings}.items() if name not in tiny.without}
    config = CONFIG_MAPPING[tiny.family](**settings, tie_word_embeddings=tiny.tied)
    with torch.random.fork_rng():
        torch.manual_seed(tiny.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _widen(model)
    model.save_pretrained(folder, max_shard_size=tiny.file_bytes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def _widen(model: PreTrainedModel) -> None:
    """Layers speak loudly, embeddings softly: where the head is tied, a loud token would only repeat itself."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            parameter.normal_(0.0, 0.02)
        elif "embeddings_layernorm" in name:
            parameter.mul_(0.05)
        elif parameter.dim() > 1:
            parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)


#: In every test run: the families that a user is likeliest to meet, and each way in which families differ.
TINY = (
    Tiny(family="llama"),
    Tiny(family="llama", variant="tied-in-files", tied=True, file_bytes=20_000),
    Tiny(family="mistral", settings={"sliding_window": 12}),
    Tiny(family="qwen2", tied=True),
    Tiny(family="qwen3", seed=3),
    Tiny(family="gemma2", tied=True, settings={"sliding_window": 12, "query_pre_attn_scalar": 8}),
    Tiny(
        family="gemma3_text",
        tied=True,
        settings={"sliding_window": 12, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
        seed=1,
    ),
    Tiny(family="phi3"),
    Tiny(family="gpt2", tied=True, settings={"n_positions": 256}, seed=14),
    Tiny(family="gpt_neox", seed=1),
    Tiny(family="opt", tied=True, settings={"ffn_dim": 64, "word_embed_proj_dim": 16}, seed=9),
    Tiny(family="bloom", tied=True, seed=8),
    Tiny(
        family="falcon",
        without=("head_dim",),
        settings={"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
        seed=1,
    ),
    Tiny(
        family="falcon",
        variant="alibi",
        without=("head_dim",),
        tied=True,
        settings={"alibi": True, "multi_query": True},
        seed=12,
    ),
    Tiny(family="mixtral", settings={"num_local_experts": 4}),
)

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_routed_experts": 4}
_LATENT = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}

#: Run on demand by scripts/families, which verifies what stands in mqinfer/families.py.
CANDIDATES = (
    Tiny(family="apertus", settings={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, seed=6),
    Tiny(family="arcee"),
    Tiny(family="biogpt", tied=True, seed=21),
    Tiny(family="codegen", settings={"rotary_dim": 4, "n_ctx": 256, "n_positions": 256}, seed=4),
    Tiny(family="cohere", tied=True),
    Tiny(family="cohere2", tied=True, settings={"sliding_window": 12}),
    Tiny(family="deepseek_v2", settings={**_EXPERTS, **_LATENT, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    Tiny(
        family="deepseek_v3",
        settings={**_EXPERTS, **_LATENT, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    ),
    Tiny(family="diffllama"),
    Tiny(family="doge", seed=2),
    Tiny(family="dots1", settings={**_EXPERTS, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    Tiny(family="ernie4_5"),
    Tiny(family="exaone4", settings={"sliding_window": 12, "sliding_window_pattern": 2}, seed=1),
    Tiny(family="flex_olmo", settings=_EXPERTS, seed=4),
    Tiny(family="gemma", tied=True),
    Tiny(family="gemma3n_text", tied=True, settings={"num_kv_shared_layers": 0}),
    Tiny(family="gemma4_text", tied=True),
    Tiny(family="glm"),
    Tiny(family="glm4", seed=2),
    Tiny(family="glm4_moe", settings={**_EXPERTS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    Tiny(family="gpt_bigcode", tied=True, settings={"n_positions": 256}),
    Tiny(
        family="gpt_neo",
        tied=True,
        settings={"attention_types": [[["global", "local"], 2]], "window_size": 12, "num_layers": LAYERS},
        seed=5,
    ),
    Tiny(family="gpt_neox_japanese", seed=3),
    Tiny(family="gpt_oss", settings={"num_local_experts": 4, "sliding_window": 12}),
    Tiny(family="gptj", settings={"rotary_dim": 4, "n_positions": 256}, seed=4),
    Tiny(family="granite"),
    Tiny(family="granitemoe", settings={"num_local_experts": 4}),
    Tiny(family="helium"),
    Tiny(family="hunyuan_v1_dense", seed=3),
    Tiny(family="hunyuan_v1_moe", settings={"num_experts": 4, "moe_topk": 2}),
    Tiny(family="jais2", seed=1),
    Tiny(family="llama4_text", settings={"num_local_experts": 4}),
    Tiny(family="ministral", settings={"sliding_window": 12}),
    Tiny(family="ministral3"),
    Tiny(family="mpt", without=("num_key_value_heads", "head_dim"), tied=True, seed=21),
    Tiny(family="nemotron"),
    Tiny(family="olmo"),
    Tiny(family="olmo2", seed=4),
    Tiny(family="olmo3", settings={"sliding_window": 12}, seed=3),
    Tiny(family="olmoe", settings=_EXPERTS),
    Tiny(family="persimmon", seed=4),
    Tiny(family="phi"),
    Tiny(family="phimoe", settings={"num_local_experts": 4}),
    Tiny(family="qwen2_moe", settings={**_EXPERTS, "shared_expert_intermediate_size": 32}),
    Tiny(family="qwen3_moe", settings=_EXPERTS, seed=1),
    Tiny(family="seed_oss", seed=1),
    Tiny(family="smollm3", tied=True, settings={"no_rope_layer_interval": 2}),
    Tiny(family="stablelm"),
    Tiny(family="starcoder2", tied=True, settings={"sliding_window": 12}, seed=6),
    Tiny(family="vaultgemma", settings={"sliding_window": 12, "query_pre_attn_scalar": 8}, seed=1),
)
