"""One record (a JSON object, a row of a data set) to one document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from splitft.data.base import Document, Segment, Source
from splitft.errors import DataError

Form = Literal["messages", "pair", "text"]


@dataclass(frozen=True)
class Located(Source):
    """A source with a place to read from; a base of its own because this field, without a default, comes first."""

    path: str


@dataclass(frozen=True)
class RecordFields:
    """Which fields of a record hold what; "" switches a form off."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    owner: str = ""
    joint: str = "\n"

    def form(self, record: Mapping[str, Any], origin: str) -> Form:
        """What the record is, by the fields it has: messages before prompt and completion before text."""
        if self.messages and self.messages in record:
            return "messages"
        if self.prompt and self.completion and self.prompt in record and self.completion in record:
            return "pair"
        if self.text and self.text in record:
            return "text"
        wanted = f"{self.messages!r}, {self.prompt!r} with {self.completion!r}, or {self.text!r}"
        raise DataError(
            f"{origin}: the record has the fields {', '.join(map(repr, record)) or 'none'}, but needs {wanted}.",
            'Name the fields that hold the text, for example data.text = "..." or data.prompt = "..." and data.completion = "...".',
        )

    def document(self, record: Mapping[str, Any], form: Form, origin: str, owner: str) -> Document | None:
        """The record as a document, or None if it holds nothing to learn (a blank text or completion)."""
        segments: tuple[Segment, ...] = ()
        messages = None
        if form == "messages":
            messages = _messages(record, self.messages, origin)
        elif form == "pair":
            prompt, completion = _string(record, self.prompt, origin), _string(record, self.completion, origin)
            if not completion.strip():
                return None
            if prompt and not prompt[-1].isspace() and not completion[0].isspace():
                prompt += self.joint
            segments = (Segment(prompt, trained=False), Segment(completion, trained=True))
        else:
            text = _string(record, self.text, origin)
            if not text.strip():
                return None
            segments = (Segment(text, trained=True),)
        columns = {key: _scalar(value) for key, value in record.items() if isinstance(value, (str, int, float))}
        if self.owner:
            if self.owner not in columns:
                raise DataError(f"{origin}: no scalar field {self.owner!r} to tell the owner.", f"It has: {', '.join(columns)}.")
            owner = columns[self.owner]
        return Document(segments, messages, owner, columns, origin)


def _scalar(value: str | float | bool) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _encodable(text: str, field: str, origin: str) -> str:
    """Half of a surrogate pair is legal in JSON but is no character: refuse it here, not deep inside a tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{origin}: field {field!r} holds half a character (a lone surrogate).", "Repair the text.") from None
    return text


def _string(record: Mapping[str, Any], field: str, origin: str) -> str:
    if field not in record:
        raise DataError(
            f"{origin}: no field {field!r}, though the first record has it; this one has {', '.join(map(repr, record))}.",
            "Give all records of a file the same fields.",
        )
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{origin}: field {field!r} is {type(value).__name__}, not text.", "Give text, or name another field.")
    return _encodable(value, field, origin)


def _messages(record: Mapping[str, Any], field: str, origin: str) -> tuple[Mapping[str, str], ...]:
    """A checked conversation; keys beside role and content are kept when they are text."""
    value = record.get(field)
    rule = 'Each message needs "role" and "content" as text, and at least one role must be "assistant".'
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{origin}: field {field!r} is not a list of messages.", rule)
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"{origin}: message {number} of {field!r} has no text under role or content.", rule)
        messages.append({key: _encodable(text, field, origin) for key, text in message.items() if isinstance(text, str)})
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise DataError(f"{origin}: field {field!r} has no answer of the assistant, so nothing to learn.", rule)
    return tuple(messages)
