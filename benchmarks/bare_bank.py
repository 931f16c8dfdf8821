"""The yardstick: as little as a batched bank of adapters can be, for GPT-2's layout only.

What a good prototype reaches when it leaves out all that a federation needs: every client has the same cut and the same rank, the bytes at
the cut are counted by nobody, nothing is clipped, scheduled, padded, recorded, aggregated or resumed. The frozen product is one matrix
product for all clients, their adapters are batched products, the loss is computed in chunks, AdamW is torch's fused kernel.

Axes: n clients, t tokens, i input width, o output width, r rank, d hidden width, v vocabulary, q = n (t - 1) predicted positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from benchmarks.setups import ALPHA, RANK, TARGETS, sharing
from benchmarks.stock import optimizer, trainable

LOSS_CHUNK = 512
ATTENTION = "bare_bank_float32"


class BankProjection(nn.Module):
    """A frozen Conv1D (weight [i o]) and one low-rank pair for each of n clients, whose rows stand in equal runs."""

    def __init__(self, base: nn.Module, clients: int) -> None:
        super().__init__()
        self.weight: Tensor = base.weight  # type: ignore[assignment]
        self.bias: Tensor = base.bias  # type: ignore[assignment]
        inputs, outputs = self.weight.shape
        self.down = nn.Parameter(torch.empty(clients, inputs, RANK).uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs)))
        self.up = nn.Parameter(torch.zeros(clients, RANK, outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        kind, clients = self.weight.dtype, self.down.shape[0]
        flat = inputs.reshape(-1, inputs.shape[-1]).to(kind)
        frozen = torch.addmm(self.bias, flat, self.weight).view(clients, -1, self.up.shape[-1])
        low = torch.bmm(flat.view(clients, -1, flat.shape[-1]), self.down.to(kind))
        return torch.baddbmm(frozen, low, self.up.to(kind), alpha=ALPHA / RANK).view(*inputs.shape[:-1], -1)


class Bytes(torch.autograd.Function):
    """To bfloat16 bytes and back, the state in the forward and its gradient in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return through_bytes(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return through_bytes(gradients[0])


def through_bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().bfloat16().contiguous().view(-1).view(torch.uint8)
    payload = bytearray(flat.numpy())
    return torch.frombuffer(payload, dtype=torch.bfloat16).view(tensor.shape).to(tensor.dtype)


class ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of hidden states [q d] under the head matrix [v d]; the gradient is formed with the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, matrix: Tensor, labels: Tensor) -> Tensor:
        gradient, total = torch.empty_like(hidden), torch.zeros(())
        for start in range(0, hidden.shape[0], LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            logits, target = (hidden[part] @ matrix.T).float(), labels[part, None]
            log_sum = logits.logsumexp(1, keepdim=True)
            total += (log_sum - logits.gather(1, target)).sum()
            chances = logits.sub_(log_sum).exp_().scatter_add_(1, target, torch.full_like(log_sum, -1.0))
            gradient[part] = chances.to(matrix.dtype) @ matrix
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None


def attend_in_float32(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """PyTorch's kernel, whose bfloat16 backward on a CPU is five times slower than its float32 one."""
    output, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
    return output.to(query.dtype), weights


class BareBank:
    """n clients in one pass over `model` (GPT-2's layout, frozen weights shared and not copied), all cut after a quarter of the blocks."""

    def __init__(self, model: PreTrainedModel, clients: int) -> None:
        AttentionInterface.register(ATTENTION, attend_in_float32)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        self.model: Any = sharing(model).train()
        self.model.set_attn_implementation(ATTENTION)
        blocks = self.model.transformer.h
        for block in blocks:
            for parent in (block.attn, block.mlp):
                for name in TARGETS:
                    if hasattr(parent, name):
                        setattr(parent, name, BankProjection(getattr(parent, name), clients))
            block.mlp.act = nn.GELU(approximate="tanh")
        cut = blocks[max(1, len(blocks) // 4)]
        cut.register_forward_pre_hook(lambda block, given: (Bytes.apply(given[0]), *given[1:]))  # type: ignore[no-untyped-call]
        self.optimizer = optimizer(trainable([self.model]))

    def step(self, ids: Tensor) -> float:
        """One optimizer step of every client on its row of ids [n t]; the mean of their losses before it."""
        self.optimizer.zero_grad()
        hidden = self.model.transformer(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        flat, labels = hidden.reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1)
        total: Tensor = ChunkedLoss.apply(flat, self.model.lm_head.weight, labels)  # type: ignore[no-untyped-call]
        # The mean over a client's own tokens, summed over clients: nobody's gradient depends on how many others there are.
        (total / (ids.shape[1] - 1)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return total.item() / labels.numel()
