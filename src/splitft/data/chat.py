"""Conversations to tokens with a mask over the assistant's answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from splitft.data.base import Ids, Mask
from splitft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
Span = tuple[int, int]
_NO_TEMPLATE = "Use a tokenizer that has one (an instruction-tuned model's), or give the data as prompt and completion."


class ChatEncoder:
    """Writes conversations with a tokenizer's chat template and finds the answers in them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = (token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special)
        marks = sorted({*added, *tokenizer.all_special_tokens}, key=lambda mark: (-len(mark), mark))
        self._special = re.compile("|".join(map(re.escape, filter(None, marks))) or r"(?!)")

    def tokens(self, messages: Messages, origin: str) -> tuple[Ids, Mask]:
        """Tokens [t] of a conversation and which of them [t] belong to an answer of the assistant.

        The text is tokenised whole, as at inference, and ends as the template ends it. A token that reaches over the start or
        the end of an answer is not trained. DataError if the template is missing, refuses the conversation, or hides answers.
        """
        self._check(origin)
        clean, hidden = self._hide_special(messages)
        whole, answers = self._answers(clean, origin)
        ids: list[int] = []
        spans: list[Span] = []
        position = 0
        for piece in re.split(f"([{''.join(hidden)}])", whole) if hidden else [whole]:
            found, places = self._encode(hidden.get(piece, piece), literal=piece in hidden)
            ids += found
            # All tokens of a hidden text stand at its one private character.
            spans += [(position, position + 1) if piece in hidden else (position + start, position + end) for start, end in places]
            position += len(piece)
        starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
        trained = np.zeros(len(ids), np.bool_)
        for first, last in answers:
            trained |= (starts >= first) & (ends <= last)
        return np.array(ids, np.int32), trained

    def _check(self, origin: str) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(f"{origin}: the record is a conversation, but the tokenizer has no chat template.", _NO_TEMPLATE)
        if not self.tokenizer.is_fast:
            kind = type(self.tokenizer).__name__
            raise DataError(f"{origin}: conversations need a tokenizer that tells where its tokens are; {kind} does not.", _NO_TEMPLATE)

    def _hide_special(self, messages: Messages) -> tuple[list[dict[str, str]], dict[str, str]]:
        """Messages in which texts that look like special tokens are replaced by private characters, and what these stand for.

        So a user who writes <|im_end|> does not end his turn.
        """
        used = set().union(*(message["content"] for message in messages))
        free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
        signs: dict[str, str] = {}

        def hide(match: re.Match[str]) -> str:
            if match.group() not in signs:
                signs[match.group()] = next(free)
            return signs[match.group()]

        clean = [{**message, "content": self._special.sub(hide, message["content"])} for message in messages]
        return clean, {sign: mark for mark, sign in signs.items()}

    def _answers(self, messages: Messages, origin: str) -> tuple[str, list[Span]]:
        """The written conversation and where its answers are, in characters.

        An answer goes from the end of the conversation before it, written with the opening of an answer, to the end of the
        conversation with it: what the model would write itself, its end mark included.
        """
        whole = self._write(messages, False, origin)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._write(messages[:number], True, origin) if number else ""
            after = self._write(messages[: number + 1], False, origin)
            if not (whole.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{origin}: the tokenizer's chat template writes message {number} differently when the conversation goes on, "
                    "so its tokens cannot be told from the rest.",
                    "Give one question and answer per record, or use prompt and completion.",
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _write(self, messages: Messages, answer_next: bool, origin: str) -> str:
        """The conversation as the template writes it, with the opening of an answer if `answer_next`."""
        from jinja2.exceptions import TemplateError

        conversation = [dict(message) for message in messages]
        try:
            return str(self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer_next))
        except TemplateError as error:
            remedy = "Put the messages in the order and roles the template wants."
            raise DataError(f"{origin}: the tokenizer's chat template refuses the conversation ({error}).", remedy) from error

    def _encode(self, text: str, literal: bool) -> tuple[list[int], list[Span]]:
        """Ids and their character spans. `literal`: nothing in the text becomes a special token."""
        options = {"split_special_tokens": literal, "return_offsets_mapping": True, "verbose": False}
        found = self.tokenizer(text, add_special_tokens=False, **options)
        return list(found["input_ids"]), [(int(start), int(end)) for start, end in found["offset_mapping"]]
