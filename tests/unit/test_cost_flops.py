"""The cost model against what PyTorch counts and keeps on tiny real models: GPT-2 (fused query-key-value) and Llama (grouped heads)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from unit.cost_shapes import SERVER

from splitft.adapt.cost import CostModel, PlanCost
from splitft.models.anatomy import describe, select_targets

BATCH, SEQUENCE, RANK = 2, 32, 4
FAMILIES = ("gpt2", "llama")


def build(family: str, blocks: int) -> Any:
    if family == "gpt2":
        sizes = {"n_layer": blocks, "n_embd": 64, "n_head": 4, "vocab_size": 97, "n_positions": 64}
        config: Any = tf.GPT2Config(**sizes, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, bos_token_id=1, eos_token_id=2)
    else:
        config = tf.LlamaConfig(
            num_hidden_layers=blocks, hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=2, vocab_size=97
        )
    config._attn_implementation = "eager"  # its products are plain matrix products, which the counter knows
    return tf.AutoModelForCausalLM.from_config(config)


def predicted(family: str, targets: str, cut: int = 2) -> tuple[CostModel, PlanCost]:
    shape = describe(build(family, 4), family)
    modules = tuple(item.module for item in select_targets(shape.blocks[0].projections, targets))
    model = CostModel(shape, SERVER, BATCH, SEQUENCE, RANK, modules=modules)
    return model, model.cost(model.plan(cut))


def adapted(family: str, blocks: int, modules: tuple[str, ...]) -> Any:
    config = LoraConfig(r=RANK, target_modules=list(modules), fan_in_fan_out=family == "gpt2", lora_dropout=0.0)
    return get_peft_model(build(family, blocks), config)


def counted(model: Any) -> tuple[int, int]:
    """Flops of one forward and of one backward as the dispatcher sees them."""
    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        output = model(input_ids=ids)[0].sum()
    with FlopCounterMode(display=False) as backward:
        output.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("targets", ["default", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_agree_with_the_flop_counter(family: str, targets: str) -> None:
    model, cost = predicted(family, targets)
    forward, backward = counted(adapted(family, 4, model.modules))
    assert cost.front_forward_flops + cost.back_forward_flops + cost.exit_forward_flops == pytest.approx(forward, rel=0.03)
    assert cost.front_backward_flops + cost.back_backward_flops + cost.exit_backward_flops == pytest.approx(backward, rel=0.03)


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_client_s_share_agrees_too(family: str, cut: int) -> None:
    """A model of `cut` blocks without its head is exactly what the client runs; block 0's saving weighs most here."""
    model, cost = predicted(family, "default", cut)
    front = adapted(family, cut, model.modules).base_model.model.base_model
    forward, backward = counted(front)
    assert cost.front_forward_flops == pytest.approx(forward, rel=0.03)
    assert cost.front_backward_flops == pytest.approx(backward, rel=0.03)


@pytest.mark.parametrize("targets", ["default", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_memory_is_within_a_factor_of_two(family: str, targets: str) -> None:
    model, shallow = predicted(family, targets, 1)
    deep = model.cost(model.plan(3))
    estimate = (deep.client_memory.activations_bytes - shallow.client_memory.activations_bytes) / 2
    kept = (kept_bytes(adapted(family, 4, model.modules)) - kept_bytes(adapted(family, 2, model.modules))) / 2
    assert kept / 2 <= estimate <= kept * 2


def kept_bytes(model: Any) -> int:
    """Bytes PyTorch keeps for the backward, every storage once, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    model.get_base_model().set_attn_implementation("sdpa")  # eager attention keeps the whole score matrix, which nobody trains with
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.zeros(BATCH, SEQUENCE, dtype=torch.long), use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())
