"""Causal attention on a CPU by batched matrix products, with its own backward.

PyTorch's fused CPU kernel computes attention at a tenth of the speed of a matrix product, in the bfloat16 backward at a hundredth.
Written as products over blocks of queries, each against the keys up to its last one, attention takes 0.55 to 0.75 of the kernel's time in
float32 and 0.3 in bfloat16 (docs/decisions/0015). What it does not cover (a mask that is not plain causal, dropout, bias, sinks, long rows,
other devices) goes to PyTorch's kernel, computed in float32, as before.

Axes: n rows times heads, t tokens, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "splitft_causal"
# Queries of a block: the diagonal's wasted half against calls of the product. Heads of a part: scores that stay in the cache.
QUERY_BLOCK = {torch.float32: 64, torch.bfloat16: 128}
HEADS_AT_ONCE = 64
# Probabilities are kept for the backward, t * t / 2 of them for a head: beyond this they would outgrow the other activations.
LONGEST = 1024
Built = TypeVar("Built")


def _tiles(heads: int, tokens: int, block: int) -> Iterator[tuple[slice, int, int]]:
    """(heads of a part, first query, one behind the last query)."""
    for first in range(0, heads, HEADS_AT_ONCE):
        for start in range(0, tokens, block):
            yield slice(first, first + HEADS_AT_ONCE), start, min(start + block, tokens)


def _scores_gradient(outer: Tensor, value: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The gradient of the unscaled scores from that of the attention's output, `outer`."""
    change = torch.bmm(outer, value.transpose(1, 2))
    found: Tensor = torch.ops.aten._softmax_backward_data(change, weights, -1, weights.dtype)
    return found.mul_(scale)


class CausalAttention(torch.autograd.Function):
    """softmax(scale q k^T, causal) v for q, k, v [n t d]; the probabilities are kept in the type of the inputs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        tokens, block = query.shape[1], QUERY_BLOCK[query.dtype]
        output = torch.empty_like(value)
        whole = tokens <= block and len(query) <= HEADS_AT_ONCE
        later = torch.full((min(block, tokens),) * 2, -math.inf, dtype=query.dtype).triu_(1)
        kept = []
        for part, start, end in _tiles(len(query), tokens, block):
            scores = torch.bmm(query[part, start:end], key[part, :end].transpose(1, 2)).mul_(scale)
            scores[:, :, start:].add_(later[: end - start, : end - start])
            weights = torch.softmax(scores, -1)
            if whole:
                output = torch.bmm(weights, value)
            else:
                output[part, start:end] = torch.bmm(weights, value[part, :end])
            if any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        (gradient,) = gradients
        tokens, block = query.shape[1], QUERY_BLOCK[query.dtype]
        if len(kept) == 1:
            change = _scores_gradient(gradient, value, kept[0], ctx.scale)
            return torch.bmm(change, key), torch.bmm(change.transpose(1, 2), query), torch.bmm(kept[0].transpose(1, 2), gradient), None
        query_gradient, key_gradient, value_gradient = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for (part, start, end), weights in zip(_tiles(len(query), tokens, block), kept, strict=True):
            outer = gradient[part, start:end]
            change = _scores_gradient(outer, value[part, :end], weights, ctx.scale)
            query_gradient[part, start:end] = torch.bmm(change, key[part, :end])
            to_value, to_key = torch.bmm(weights.transpose(1, 2), outer), torch.bmm(change.transpose(1, 2), query[part, start:end])
            # Keys of this block see it first; earlier keys have been seen by earlier blocks.
            value_gradient[part, start:end], key_gradient[part, start:end] = to_value[:, start:], to_key[:, start:]
            if start:
                value_gradient[part, :start].add_(to_value[:, :start])
                key_gradient[part, :start].add_(to_key[:, :start])
        return query_gradient, key_gradient, value_gradient, None


def _is_plain(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether this is nothing but causal attention over whole rows of a length that `CausalAttention` is for."""
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal) or mask is not None or options.get("dropout"):
        return False
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache", "head_mask")):
        return False
    return query.device.type == "cpu" and query.dtype in QUERY_BLOCK and 1 < query.shape[2] == key.shape[2] <= LONGEST


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
    """transformers' attention call: query, key, value [rows heads t d] to [rows t heads d]."""
    if not _is_plain(module, query, key, mask, options):
        narrow = query.dtype.itemsize < 4  # the kernel's backward in bfloat16 takes five times as long as in float32
        wide = mask.float() if narrow and mask is not None and mask.is_floating_point() else mask
        given = (query.float(), key.float(), value.float()) if narrow else (query, key, value)
        output, weights = sdpa_attention_forward(module, *given, wide, **options)
        return output.to(query.dtype), weights
    groups = int(getattr(module, "num_key_value_groups", 1))
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    rows, heads, tokens, width = query.shape
    scaling = options.get("scaling")
    flat = [one.reshape(rows * heads, tokens, one.shape[3]) for one in (query, key, value)]
    found: Tensor = CausalAttention.apply(*flat, width**-0.5 if scaling is None else float(scaling))  # type: ignore[no-untyped-call]
    return found.view(rows, heads, tokens, -1).transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the attention known to transformers; returns its name for `attn_implementation`."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def suited(family: type[PreTrainedModel], config: PretrainedConfig) -> str:
    """The attention to ask for on a CPU: this one where the family offers sdpa, which has the same interface and limits (Gemma 2's soft cap
    and gpt-oss's sinks would be passed over in silence); else "sdpa", which the family then refuses by itself. Families that choose the
    tokens to attend to (`index_topk`) do so for the attentions they know by name only."""
    sparse = getattr(config.get_text_config(), "index_topk", None) is not None
    return register() if getattr(family, "_supports_sdpa", False) and not sparse else "sdpa"


def build_with(build: Callable[[str], Built], wanted: str) -> Built:
    """`build(attention)` with the attention wanted, or the next plainer one (sdpa, then eager) where the family does not offer it.

    transformers answers a family without sdpa with a ValueError; a family with an attention table of its own (Falcon) knows no
    registered names and answers with a KeyError.
    """
    *others, last = [wanted] if wanted == "eager" else dict.fromkeys((wanted, "sdpa", "eager"))
    for name in others:
        try:
            return build(name)
        except KeyError as problem:
            if problem.args != (name,):
                raise
        except ValueError as problem:
            if "attention" not in str(problem).lower() and "attn" not in str(problem).lower():
                raise
    return build(last)
