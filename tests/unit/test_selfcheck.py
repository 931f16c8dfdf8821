"""selfcheck.py: what cannot be cut exactly is refused by name, what is only not ragged is marked, what is shrunk stays of its family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from splitft import split as split_module
from splitft.errors import ModelError
from splitft.models.anatomy import without_dropout
from splitft.selfcheck import TINY_BLOCKS, build_random, inspect_family, loud, refuse_unsupported, shrink

from ..support import FAMILIES


def gemma3n() -> tf.PretrainedConfig:
    return tf.Gemma3nTextConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, head_dim=8
    )


def bert(is_decoder: bool) -> tf.PretrainedConfig:
    return tf.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, is_decoder=is_decoder
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: tf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4), r"t5.*|encoder-decoder \(t5\)"),
        (gemma3n, r"gemma3n.*num_kv_shared_layers = 15.*more than one hidden state"),
        (lambda: bert(False), r"bert\) looks ahead: a later token changes an earlier prediction"),
    ],
    ids=["t5", "gemma3n", "bert"],
)
def test_families_that_are_no_causal_chain_are_refused_with_the_reason(config: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        inspect_family(config(), "the-model")
    assert "the-model" in str(caught.value)
    assert caught.value.remedy


def test_bert_with_its_decoder_switch_looks_back_only() -> None:
    assert inspect_family(bert(True), "bert-decoder").blocks_path == "bert.encoder.layer"


def test_shared_state_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitft.selfcheck.build_random", lambda *arguments: pytest.fail("a model was built"))
    with pytest.raises(ModelError, match="num_kv_shared_layers"):
        inspect_family(gemma3n(), "gemma3n")


def second_state(monkeypatch: pytest.MonkeyPatch, model: type, block: type) -> None:
    """Sabotage a family: from the second block on, a block also adds what the first was given in the same pass."""
    stash: dict[str, Tensor] = {}
    model_forward, block_forward = model.forward, block.forward

    def whole(self: Any, *arguments: Any, **named: Any) -> Any:
        stash.clear()
        return model_forward(self, *arguments, **named)

    def one(self: Any, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        first = stash.setdefault("first", hidden_states)
        extra = 0.5 * first if first.shape == hidden_states.shape and first is not hidden_states else 0.0
        output = block_forward(self, hidden_states, *arguments, **named)
        return (output[0] + extra, *output[1:]) if isinstance(output, tuple) else output + extra

    monkeypatch.setattr(model, "forward", whole)
    monkeypatch.setattr(block, "forward", one)


@pytest.mark.parametrize(
    ("family", "model", "block"),
    [
        ("gpt2", modeling_gpt2.GPT2Model, modeling_gpt2.GPT2Block),
        ("llama", modeling_llama.LlamaModel, modeling_llama.LlamaDecoderLayer),
    ],
)
def test_a_second_state_between_blocks_is_found_at_the_cut(monkeypatch: pytest.MonkeyPatch, family: str, model: type, block: type) -> None:
    second_state(monkeypatch, model, block)
    with pytest.raises(ModelError, match=rf"{family}\): cut after block 1, plain batch, changes the logits by") as caught:
        inspect_family(FAMILIES[family](), family)
    assert "something besides the hidden state passes between its blocks" in str(caught.value)


def test_an_unknown_step_behind_the_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_gpt2.GPT2LMHeadModel.forward

    def bent(self: Any, *arguments: Any, **named: Any) -> Any:
        output = forward(self, *arguments, **named)
        output.logits = output.logits.sin()
        return output

    monkeypatch.setattr(modeling_gpt2.GPT2LMHeadModel, "forward", bent)
    with pytest.raises(ModelError, match="changes the logits behind its LM head"):
        inspect_family(FAMILIES["gpt2"](), "bent")


def test_rows_taken_wrongly_leave_the_family_not_ragged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inspect_family(FAMILIES["llama"](), "llama").ragged is True
    monkeypatch.setattr(split_module, "first_rows", lambda value, active, total: value)
    assert inspect_family(FAMILIES["llama"](), "llama").ragged is False


def test_the_last_rows_instead_of_the_first_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes fit, only the numbers are those of other rows."""

    def last_rows(value: Any, active: int, total: int) -> Any:
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == total:
            return value[total - active :]
        if isinstance(value, dict):
            return {name: last_rows(item, active, total) for name, item in value.items()}
        return type(value)(last_rows(item, active, total) for item in value) if isinstance(value, tuple) else value

    monkeypatch.setattr(split_module, "first_rows", last_rows)
    assert inspect_family(FAMILIES["llama"](), "llama").ragged is False


def test_a_family_that_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise KeyError("some_field")

    monkeypatch.setattr("splitft.selfcheck.build_random", broken)
    with pytest.raises(ModelError, match=r"self-check could not run a small copy: KeyError: 'some_field'"):
        inspect_family(FAMILIES["gpt2"](), "gpt2")


@pytest.mark.parametrize(
    ("family", "kind", "value"),
    [("gpt2", "nothing", 1.0), ("granite", "divide", 2.0), ("cohere", "multiply", 0.0625), ("gemma2", "softcap", 30.0)],
)
def test_what_follows_the_head_is_found(family: str, kind: str, value: float) -> None:
    anatomy = inspect_family(FAMILIES[family](), family)
    assert (anatomy.after_head, anatomy.after_head_value) == (kind, value)
    raw = torch.tensor([1.0, -40.0])
    wanted = {"nothing": raw, "divide": raw / 2, "multiply": raw / 16, "softcap": torch.tanh(raw / 30) * 30}[kind]
    torch.testing.assert_close(anatomy.finish(raw), wanted)


def test_paths_name_the_blocks_and_the_head() -> None:
    anatomy = inspect_family(FAMILIES["gpt2"](), "gpt2")
    assert (anatomy.blocks_path, anatomy.head_path) == ("transformer.h", "lm_head")
    anatomy = inspect_family(FAMILIES["llama"](), "llama")
    assert (anatomy.blocks_path, anatomy.head_path) == ("model.layers", "lm_head")


def test_a_large_configuration_is_shrunk_and_keeps_its_traits() -> None:
    config = tf.LlamaConfig(num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672)
    small = shrink(config)
    assert (small.num_hidden_layers, small.num_attention_heads, small.num_key_value_heads) == (TINY_BLOCKS, 4, 1)
    assert small.hidden_size == 64
    assert (config.num_hidden_layers, config.hidden_size) == (80, 8192), "the given configuration is left alone"
    assert sum(parameter.numel() for parameter in build_random(small, "sdpa").parameters()) < 500_000


def test_dropout_is_switched_off_in_a_copy() -> None:
    config = tf.GPT2Config()
    clean = without_dropout(config)
    assert config.resid_pdrop == config.attn_pdrop == config.embd_pdrop == 0.1
    assert clean.resid_pdrop == clean.attn_pdrop == clean.embd_pdrop == clean.summary_first_dropout == 0.0


def test_loud_weights_make_every_block_matter() -> None:
    with torch.random.fork_rng(devices=[]):
        model = loud(build_random(shrink(without_dropout(FAMILIES["gpt2"]())), "sdpa"))
    ids = torch.arange(1, 7)[None]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        for block in list(model.transformer.h):
            kept = block.forward
            returned = (
                (lambda state: (state, None)) if isinstance(kept(torch.zeros(1, 1, model.config.n_embd)), tuple) else (lambda state: state)
            )
            block.forward = lambda hidden_states, *arguments, back=returned, **named: back(hidden_states)  # type: ignore[method-assign]
            without = model(input_ids=ids, use_cache=False).logits
            block.forward = kept  # type: ignore[method-assign]
            assert float((without - whole).abs().max() / whole.abs().max()) > 0.05


def test_the_check_leaves_torch_s_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    inspect_family(FAMILIES["gpt2"](), "gpt2")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_supported_configurations_pass_the_first_look() -> None:
    for family in FAMILIES.values():
        refuse_unsupported(family(), "model")
