"""Find a family's anatomy and prove, before anything is trained, that cutting it changes nothing.

A copy of the model with the same configuration but tiny widths and few blocks is built with random weights and run whole and cut at
every block; hidden states, logits and gradients must agree. So "which models work" is a check, not a list.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitft.errors import ModelError
from splitft.lora import AdapterBank, Layout
from splitft.models.anatomy import block_count, find_blocks, find_head, without_dropout
from splitft.models.attention import build_with
from splitft.models.base import AfterHead, Anatomy
from splitft.split import Route, SplitModel

TINY_BLOCKS = 4
TINY_TOKENS = 6
ROWS = 4
TOLERANCE = 1e-4
MASKLESS_TOLERANCE = 1e-5
Whole: TypeAlias = dict[str, tuple[Tensor, Tensor | None]]
SHARED_STATE = ("num_kv_shared_layers", "hidden_size_per_layer_input", "num_nextn_predict_layers_shared")


def refuse_unsupported(config: PretrainedConfig, name: str) -> None:
    """ModelError for what is known not to be a chain of blocks with one state between them."""
    if config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder ({config.model_type}).", "splitft splits decoder-only causal language models.")
    text = config.get_text_config()
    for field in SHARED_STATE:
        if getattr(text, field, 0):
            raise ModelError(
                f"{name} ({config.model_type}) has {field} = {getattr(text, field)}: its blocks share more than one hidden state.",
                "such a model cannot be cut between blocks without sending that too; choose another model.",
            )


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """The same family with a few blocks, narrow widths and a small vocabulary; per-block lists are cut to length."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    blocks = int(text.num_hidden_layers)
    keep = min(blocks, max(2, TINY_BLOCKS))
    heads = int(text.num_attention_heads)
    groups = int(getattr(text, "num_key_value_heads", None) or heads)
    tiny_heads = 4 if heads >= 4 else heads
    tiny_groups = tiny_heads if groups == heads else max(1, tiny_heads * groups // heads)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == blocks and blocks > 1:
            setattr(text, name, value[:keep])
    _set(text, "num_hidden_layers", keep)
    if getattr(text, "attention_types", None) and text.model_type == "gpt_neo":
        text.attention_types = [[list(text.attention_layers), 1]]
    width = tiny_heads * 16
    ratio = (getattr(text, "word_embed_proj_dim", None) or text.hidden_size) / text.hidden_size
    for name, value in {
        "hidden_size": width,
        "num_attention_heads": tiny_heads,
        "num_key_value_heads": tiny_groups,
        "intermediate_size": 2 * width,
        "ffn_dim": 2 * width,
        "n_inner": 2 * width,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
        "head_dim": 16,
        "vocab_size": 64,
        "word_embed_proj_dim": max(8, int(width * ratio)),
        "num_local_experts": 4,
        "num_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "query_pre_attn_scalar": 16,
        "rotary_dim": 8,
        "max_window_layers": 1,
        "sliding_window": 3,
        "window_size": 3,
    }.items():
        if getattr(text, name, None) is not None:
            _set(text, name, value)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    return small


def _set(config: PretrainedConfig, name: str, value: Any) -> None:
    """Set a field through the family's own name for it; drop it silently where the family computes it (GPT-Neo's layer count)."""
    try:
        setattr(config, name, value)
    except (AttributeError, TypeError):
        return


def inspect_family(config: PretrainedConfig, name: str, attention: str = "sdpa", prove: bool = True) -> Anatomy:
    """The anatomy of the family, after the self-check unless `prove` is off. Takes 0.1 to 0.5 s; no weights are needed.

    Raises ModelError naming what was found when the model is not supported or a cut would change its results.
    """
    refuse_unsupported(config, name)
    try:
        return _inspect(shrink(without_dropout(config)), name, attention, prove)
    except ModelError:
        raise
    except Exception as problem:
        raise ModelError(
            f"{name} ({config.model_type}): the self-check could not run a small copy: {type(problem).__name__}: {problem}",
            "this family is not supported by the installed transformers version or is not a chain of blocks.",
        ) from problem


def _inspect(config: PretrainedConfig, name: str, attention: str, prove: bool) -> Anatomy:
    with torch.random.fork_rng(devices=[]):
        model = loud(build_random(config, attention))
        ids = torch.randint(1, config.get_text_config().vocab_size, (ROWS, TINY_TOKENS))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    blocks_path, blocks = find_blocks(model, block_count(config))
    head_path, head = find_head(model)
    seen: dict[str, Any] = {}
    hooks = [
        blocks[-1].register_forward_hook(lambda module, inputs, output: seen.update(output=output)),
        head.register_forward_hook(lambda module, inputs, output: seen.update(raw=output)),
    ]
    whole = {}
    with torch.no_grad():
        for case, given in (("plain", None), ("padded", mask)):
            logits = model(input_ids=ids, attention_mask=given, use_cache=False).logits
            whole[case] = (logits.detach(), given)
            raw = seen["raw"]
    for hook in hooks:
        hook.remove()
    _require_causal(model, ids, name)
    kind, value = _after_head(config, raw, logits, name)
    same = _error(whole["plain"][0], whole["padded"][0], mask.bool()) <= MASKLESS_TOLERANCE
    anatomy = Anatomy(blocks_path, head_path, isinstance(seen["output"], tuple), kind, value, maskless=same)
    return _prove(model, anatomy, ids, whole, name) if prove else anatomy


def _require_causal(model: PreTrainedModel, ids: Tensor, name: str) -> None:
    """ModelError when a later token changes an earlier prediction (BERT and kin, built without their decoder switch)."""
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        first, second = (model(input_ids=given, use_cache=False).logits[:, :-1] for given in (ids, other))
    if not torch.allclose(first, second, atol=1e-5, rtol=1e-4):
        raise ModelError(
            f"{name} ({model.config.model_type}) looks ahead: a later token changes an earlier prediction.", "choose a causal model."
        )


def build_random(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """A model with random weights from its configuration, in evaluation mode; a plainer attention where the one named is not offered."""
    model = build_with(lambda name: AutoModelForCausalLM.from_config(config, attn_implementation=name), attention)
    return model.float().eval()


def loud(model: PreTrainedModel) -> PreTrainedModel:
    """Give every block weights large enough that leaving something out of a pass shows in the logits (fresh models are near linear)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.2)
            elif not name.endswith("bias"):
                parameter.uniform_(0.7, 1.3)
            else:
                parameter.normal_(0.0, 0.1)
    return model


def _after_head(config: PretrainedConfig, raw: Tensor, logits: Tensor, name: str) -> tuple[AfterHead, float]:
    """Which known step turns the head's output into the logits."""
    text = config.get_text_config()
    candidates: list[tuple[AfterHead, float]] = [("nothing", 1.0)]
    for kind, field in (("divide", "logits_scaling"), ("multiply", "logit_scale"), ("softcap", "final_logit_softcapping")):
        value = getattr(text, field, None)
        if value is not None:
            candidates.append((kind, float(value)))  # type: ignore[arg-type]
    for kind, value in candidates:
        if torch.allclose(Anatomy("", "", False, kind, value).finish(raw.float()), logits.float(), atol=1e-5, rtol=1e-4):
            return kind, value
    raise ModelError(
        f"{name} ({text.model_type}) changes the logits behind its LM head in a way splitft does not know.", "choose another model."
    )


def _prove(model: PreTrainedModel, anatomy: Anatomy, ids: Tensor, whole: Whole, name: str) -> Anatomy:
    """Every cut against the whole model, then gradients and adapters, then passes that sessions with different cuts share."""
    split = SplitModel(model, anatomy, "all")
    with torch.no_grad():
        for case, (logits, given) in whole.items():
            valid = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
            for cut in range(1, split.blocks + 1):
                front = split.run(Route(ROWS, last=cut - 1), ids, given)
                error = _error(split.logits(split.run(Route(ROWS, entries={cut: front}), None, given)), logits, valid)
                if not error <= TOLERANCE:
                    raise ModelError(
                        f"{name} ({model.config.model_type}): cut after block {cut}, {case} batch, changes the logits by {error:.2g}.",
                        "something besides the hidden state passes between its blocks; this model cannot be split exactly.",
                    )
        ragged = all(_ragged_agrees(split, ids, whole, rows) for rows in (2, 3, ROWS))
    bypassed = _prove_adapters(split, ids, name)
    return replace(anatomy, ragged=ragged, bypassed=bypassed)


def _error(found: Tensor, expected: Tensor, valid: Tensor) -> float:
    """Largest difference on valid positions, relative to the largest value; NaN stays NaN and fails every comparison."""
    return float((found - expected)[valid].abs().max() / expected[valid].abs().max())


def _ragged_agrees(split: SplitModel, ids: Tensor, whole: Whole, rows: int) -> bool:
    """The first `rows` rows, each entering at another block, against the whole model. Row counts that divide the number of heads show
    arguments laid out by head that would be taken for arguments laid out by row."""
    count = split.blocks
    cuts = [1, 1, max(1, count // 2), count][-rows:]
    for logits, given in whole.values():
        entries: dict[int, Tensor] = {}
        for row, cut in enumerate(cuts):
            alone = split.run(Route(1, last=cut - 1), ids[row : row + 1], None if given is None else given[row : row + 1])
            entries[cut] = torch.cat([entries[cut], alone]) if cut in entries else alone
        mask = None if given is None else given[:rows]
        valid = torch.ones_like(ids[:rows], dtype=torch.bool) if mask is None else mask.bool()
        try:
            found = split.logits(split.run(Route(rows, entries=entries, sessions=rows), None, mask))
        except (RuntimeError, ValueError, IndexError):
            return False
        if not _error(found, logits[:rows], valid) <= TOLERANCE:
            return False
    return True


def _prove_adapters(split: SplitModel, ids: Tensor, name: str) -> tuple[str, ...]:
    """Adapters do what merged weights do, and a cut pass gives them the gradients of an uncut one.

    Returns the projections whose module the family goes around (it reads their weight directly), so that an adapter would not be seen.
    """
    if not split.keys:
        return ()
    layout = Layout.of(split.keys, 2, 1.0)
    row = layout.initial_row(0)
    row += 0.1 * torch.sin(torch.arange(layout.parameters))
    bank, middle = AdapterBank(layout, 1), max(1, split.blocks // 2)
    with torch.no_grad():
        bank.values[0] = row
    joined = split.logits(split.run(Route(ROWS, bank=bank), ids, None))
    joined.square().mean().backward()  # type: ignore[no-untyped-call]
    expected = bank.gradients.clone()
    bank.zero_gradients()
    hidden = split.run(Route(ROWS, last=middle - 1, bank=bank), ids, None)
    received = hidden.detach().requires_grad_(True)
    found = split.logits(split.run(Route(ROWS, entries={middle: received}, bank=bank), None, None))
    found.square().mean().backward()  # type: ignore[no-untyped-call]
    hidden.backward(received.grad)  # type: ignore[no-untyped-call]
    everything = torch.ones(1, dtype=torch.bool)
    if not _error(bank.gradients, expected, everything.expand(1)) <= TOLERANCE:
        raise ModelError(
            f"{name} ({split.model.config.model_type}): a cut after block {middle} changes the adapters' gradients.",
            "something besides the hidden state passes between its blocks; this model cannot be split exactly.",
        )
    unseen = {key.module for key, (a, _) in layout.factors(expected[0]).items() if not float(a.abs().max()) > 0}
    for key, (a, b) in layout.factors(row).items():
        projection = split.projection(key)
        change = b @ a
        if key.module not in unseen:
            with torch.no_grad():
                projection.weight += change.T if isinstance(projection, Conv1D) else change  # type: ignore[operator]
    with torch.no_grad():
        merged = split.logits(split.run(Route(ROWS), ids, None))
    if not _error(joined.detach(), merged, torch.ones_like(ids, dtype=torch.bool)) <= TOLERANCE:
        raise ModelError(
            f"{name} ({split.model.config.model_type}): adapters do not act as the same change of the weights would.",
            "a projection is used in more than one way; name the ones to adapt in lora.targets.",
        )
    return tuple(sorted(unseen))
