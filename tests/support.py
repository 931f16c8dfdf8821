"""Fixtures shared by the tests: tiny models from configurations, token rows, federations. No network, no files outside tmp_path."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers as tf

from splitft.compress.base import Codec
from splitft.compress.identity import Identity
from splitft.data.base import ClientData, TokenRows
from splitft.data.order import BatchOrder
from splitft.engine.settings import Federation, TrainSettings
from splitft.lora import Layout
from splitft.models.anatomy import without_dropout
from splitft.models.base import Anatomy
from splitft.optimizer import AdamW, Schedule
from splitft.selfcheck import inspect_family, loud
from splitft.split import SplitModel

VOCABULARY = 96
BLOCKS = 4
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _sized(name: str, without: Sequence[str] = (), **fields: Any) -> tf.PretrainedConfig:
    values = {key: value for key, value in {**_SIZES, **fields}.items() if key not in without}
    return getattr(tf, name)(**values)


def _gpt(name: str, **fields: Any) -> tf.PretrainedConfig:
    return getattr(tf, name)(
        vocab_size=VOCABULARY, n_embd=32, n_layer=BLOCKS, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, **fields
    )


def _opt(**fields: Any) -> tf.PretrainedConfig:
    return tf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
        **fields,
    )


FAMILIES: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "gpt2": lambda: _gpt("GPT2Config"),
    "opt": lambda: _opt(word_embed_proj_dim=32),
    "opt-350m-layout": lambda: _opt(word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=BLOCKS,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": lambda: _sized("GPTNeoXConfig", without=["num_key_value_heads"]),
    "gptj": lambda: _gpt("GPTJConfig", rotary_dim=4),
    "bloom": lambda: tf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=BLOCKS, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: _sized("LlamaConfig"),
    "llama-tied": lambda: _sized("LlamaConfig", tie_word_embeddings=True),
    "qwen2": lambda: _sized("Qwen2Config", use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "qwen3": lambda: _sized("Qwen3Config", head_dim=8),
    "mistral-window": lambda: _sized("MistralConfig", sliding_window=4),
    "gemma": lambda: _sized("GemmaConfig", head_dim=8),
    "gemma2": lambda: _sized("Gemma2Config", head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3": lambda: _sized("Gemma3TextConfig", head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "phi": lambda: _sized("PhiConfig"),
    "phi3": lambda: _sized("Phi3Config", rope_scaling=None),
    "olmo2": lambda: _sized("Olmo2Config"),
    "stablelm": lambda: _sized("StableLmConfig"),
    "granite": lambda: _sized("GraniteConfig", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5),
    "cohere": lambda: _sized("CohereConfig"),
    "starcoder2": lambda: _sized("Starcoder2Config"),
    "mixtral": lambda: _sized("MixtralConfig", num_local_experts=4),
}


def build(family: str = "gpt2", attention: str = "sdpa", seed: int = 0) -> tf.PreTrainedModel:
    """A tiny model with loud random weights; the same for the same arguments."""
    config = without_dropout(FAMILIES[family]())
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        try:
            model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        except ValueError:
            model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        return loud(model.float().eval())


def build_sized(family: str, vocabulary: int) -> tf.PreTrainedModel:
    """As `build`, with another vocabulary."""
    config = without_dropout(FAMILIES[family]())
    config.vocab_size = vocabulary
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return loud(tf.AutoModelForCausalLM.from_config(config).float().eval())


@functools.cache
def anatomy_of(family: str, attention: str) -> Anatomy:
    """What the self-check finds of a family; it takes a tenth of a second, and hundreds of tests ask."""
    return inspect_family(FAMILIES[family](), family, attention)


def split_model(family: str = "gpt2", targets: str | list[str] = "default", attention: str = "sdpa") -> SplitModel:
    return SplitModel(build(family, attention), replace(anatomy_of(family, attention)), targets)  # a copy: some tests change it


def random_rows(count: int, length: int | tuple[int, int], seed: int, prompt: int = 0) -> TokenRows:
    """Rows of random tokens; with a range of lengths they are uneven, and the first `prompt` tokens are not trained on."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        size = length if isinstance(length, int) else int(draw.integers(length[0], length[1] + 1))
        ids = draw.integers(3, VOCABULARY, size).astype(np.int32)
        trained = np.ones(size, bool)
        trained[:prompt] = False
        rows.append((ids, trained))
    return TokenRows.build(rows)


def settings(**changes: Any) -> TrainSettings:
    codec: Codec = Identity()
    fields: dict[str, Any] = {
        "batch_size": 2,
        "gradient_accumulation": 1,
        "schedule": Schedule(5e-3, 8, 1, "linear"),
        "optimizer": AdamW(weight_decay=0.1),
        "clip_norm": 0.5,
        "keep_moments": False,
        "uplink": codec,
        "downlink": codec,
        "adapter_uplink": codec,
        "adapter_downlink": codec,
        "seed": 3,
    }
    return TrainSettings(**{**fields, **changes})


def federation(
    family: str = "gpt2",
    clients: int = 3,
    length: int | tuple[int, int] = 12,
    rank: int = 3,
    targets: str | list[str] = "default",
    prompt: int = 0,
    rows: int = 5,
    **changes: Any,
) -> Federation:
    """A federation over a tiny model with random data, uneven amounts, identity codecs unless changed."""
    split = split_model(family, targets)
    chosen = settings(**changes)
    data = tuple(
        ClientData(k, f"client-{k}", rows + k, random_rows(rows + k, length, 10 + k, prompt), random_rows(2, 10, 90 + k))
        for k in range(clients)
    )
    orders = tuple(BatchOrder(len(one.train), chosen.batch_size, chosen.seed, one.client) for one in data)
    layout = Layout.of(split.keys, rank, 2.0)
    return Federation(split, layout, data, orders, chosen, VOCABULARY, torch.device("cpu"), layout.initial_row(1))
