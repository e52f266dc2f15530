"""The verified families: transformers' model type -> how rows of unlike length share a forward. Pure data.

Exactly those that `scripts/families` found equal to `generate` stand here; a plan for another is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Rows are packed one after another; the family lets attention be replaced.
RAGGED = "ragged"
#: Rows of equal count are batched, their pasts padded on the left; the family has an attention of its own.
PADDED = "padded"

VERIFIED: Mapping[str, str] = {
    "apertus": RAGGED,
    "arcee": RAGGED,
    "biogpt": RAGGED,
    "bloom": PADDED,
    "codegen": PADDED,
    "cohere": RAGGED,
    "cohere2": RAGGED,
    "deepseek_v2": RAGGED,
    "deepseek_v3": RAGGED,
    "diffllama": PADDED,
    "doge": PADDED,
    "dots1": RAGGED,
    "ernie4_5": RAGGED,
    "exaone4": RAGGED,
    "falcon": PADDED,
    "flex_olmo": RAGGED,
    "gemma": RAGGED,
    "gemma2": RAGGED,
    "gemma3_text": RAGGED,
    "glm": RAGGED,
    "glm4": RAGGED,
    "glm4_moe": RAGGED,
    "gpt2": RAGGED,
    "gpt_bigcode": RAGGED,
    "gpt_neo": PADDED,
    "gpt_neox": RAGGED,
    "gpt_neox_japanese": PADDED,
    "gpt_oss": RAGGED,
    "gptj": PADDED,
    "granite": RAGGED,
    "granitemoe": RAGGED,
    "helium": RAGGED,
    "hunyuan_v1_dense": RAGGED,
    "hunyuan_v1_moe": RAGGED,
    "jais2": RAGGED,
    "llama": RAGGED,
    "ministral": RAGGED,
    "ministral3": RAGGED,
    "mistral": RAGGED,
    "mixtral": RAGGED,
    "mpt": PADDED,
    "nemotron": RAGGED,
    "olmo": RAGGED,
    "olmo2": RAGGED,
    "olmo3": RAGGED,
    "olmoe": RAGGED,
    "opt": RAGGED,
    "persimmon": RAGGED,
    "phi": RAGGED,
    "phi3": RAGGED,
    "phimoe": RAGGED,
    "qwen2": RAGGED,
    "qwen2_moe": RAGGED,
    "qwen3": RAGGED,
    "qwen3_moe": RAGGED,
    "seed_oss": RAGGED,
    "smollm3": RAGGED,
    "stablelm": RAGGED,
    "starcoder2": RAGGED,
    "vaultgemma": RAGGED,
}
