"""Find the blocks, the head and the adaptable projections of a causal LM by structure, not by a list of names."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitft.errors import AdapterError, ModelError
from splitft.types import BlockShape, ModelShape, Projection

ATTENTION_WORDS = ("attn", "attention")
EXPERT_WORDS = ("experts", "expert")
ROUTER_WORDS = ("gate", "router", "shared_expert_gate", "mlp_gate")


def block_count(config: PretrainedConfig) -> int:
    """Number of transformer blocks the configuration declares."""
    return int(config.get_text_config().num_hidden_layers)


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with every dropout rate at zero: split and unsplit would otherwise draw different masks."""
    clean = copy.deepcopy(config)
    for part in {id(clean): clean, id(clean.get_text_config()): clean.get_text_config()}.values():
        for name, value in list(vars(part).items()):
            if ("drop" in name or name == "layerdrop") and isinstance(value, float):
                setattr(part, name, 0.0)
    return clean


def find_blocks(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """Path and list of the blocks: the shallowest ModuleList as long as the configuration says (expert lists lie deeper).

    Raises ModelError when there is none.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of {count} transformer blocks.",
            "splitft needs a decoder-only model whose blocks stand in one list; choose another model.",
        )
    return min(found, key=lambda item: item[0].count("."))


def find_head(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Path and module of the LM head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            return name, module
    raise ModelError(f"{type(model).__name__} names no LM head.", "choose a causal language model with an output projection.")


def is_projection(module: nn.Module) -> bool:
    """True for the linear layers LoRA can adapt (nn.Linear, and GPT-2's Conv1D, which stores its weight transposed)."""
    return isinstance(module, nn.Linear | Conv1D)


def widths(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a projection."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    first, second = weight.shape
    return (int(first), int(second)) if isinstance(module, Conv1D) else (int(second), int(first))


def projections(block: nn.Module) -> tuple[Projection, ...]:
    """The adaptable projections of a block, in module order.

    Routers and the experts of a mixture are left out: an expert sees a gathered subset of tokens, without the order of clients that
    the batched pass relies on.
    """
    found = []
    for name, module in block.named_modules():
        parts = name.split(".")
        if is_projection(module) and parts[-1] not in ROUTER_WORDS and not any(part in EXPERT_WORDS for part in parts):
            inputs, outputs = widths(module)
            found.append(Projection(name, inputs, outputs))
    return tuple(found)


def select_targets(available: tuple[Projection, ...], targets: str | list[str] | tuple[str, ...]) -> tuple[Projection, ...]:
    """The projections to adapt: `default` (those of the attention), `all`, or the names given (a full path or its ending).

    Raises AdapterError for a name that matches nothing.
    """
    if not available:
        raise AdapterError("the model's blocks have no linear projections that could take an adapter.", "choose another model.")
    if targets == "all":
        return available
    if targets == "default":
        return tuple(p for p in available if any(word in part for part in p.module.split(".") for word in ATTENTION_WORDS)) or available
    names = [targets] if isinstance(targets, str) else list(targets)
    for name in names:
        if not any(p.module == name or p.module.endswith("." + name) for p in available):
            known = ", ".join(p.module for p in available)
            raise AdapterError(
                f"lora.targets: no projection is called {name!r}.", f"this model's blocks have: {known}; or use 'default' or 'all'."
            )
    return tuple(p for p in available if any(p.module == name or p.module.endswith("." + name) for name in names))


def describe(model: PreTrainedModel, name: str) -> ModelShape:
    """The shapes the cost model needs; works on a model without weights (meta device)."""
    config = model.config.get_text_config()
    _, blocks = find_blocks(model, block_count(model.config))
    _, head = find_head(model)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    head_parameters = sum(p.numel() for p in head.parameters())
    embedding_parameters = sum(p.numel() for p in embedding.parameters())
    in_blocks = sum(p.numel() for p in blocks.parameters())
    tied = head.weight is embedding.weight or bool(getattr(config, "tie_word_embeddings", False))
    total = sum(p.numel() for p in model.parameters())
    counted = in_blocks + embedding_parameters + (0 if head.weight is embedding.weight else head_parameters)
    heads = int(config.num_attention_heads)
    head_width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return ModelShape(
        name=name,
        blocks=tuple(_block_shape(block, config) for block in blocks),
        hidden_size=int(config.hidden_size),
        attention_width=heads * head_width,
        vocabulary=int(config.vocab_size),
        embedding_parameters=embedding_parameters,
        exit_parameters=max(0, total - counted),
        head_parameters=head_parameters,
        positions=int(getattr(config, "max_position_embeddings", 0) or 0),
        tied=tied,
    )


def _block_shape(block: nn.Module, config: PretrainedConfig) -> BlockShape:
    """Parameters of one block; of a mixture of experts only the chosen share is active for a token."""
    total = expert = 0
    for name, parameter in block.named_parameters():
        total += parameter.numel()
        if any(part in EXPERT_WORDS for part in name.split(".")):
            expert += parameter.numel()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    active = total - expert + int(expert * min(1.0, chosen / experts))
    return BlockShape(total, active, projections(block))
