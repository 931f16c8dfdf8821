"""A tokenizer of single characters with special tokens and a chat template, made on the spot."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def byte_tokenizer(*, start: bool = False, end: bool = True, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte. `start`: puts <s> in front of a text by itself; `end`: has an end-of-text token </s>."""
    special = ["<s>", "</s>", "<|turn|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if start:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>"} if end else {"bos_token": "<s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=special[2:], model_max_length=64, **names)
    tokenizer.chat_template = template
    return tokenizer
