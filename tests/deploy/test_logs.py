"""Logs: one line an event whatever peers send, nothing that should stay private, every form readable again."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.deploy.logs import Form, log, log_to, one_line

NAME = "splitft.test_logs"
HOSTILE = (
    "two\nlines",
    "\x1b[2J\x1b[31mred",
    "\r\x08\x08overwritten",
    "line\u2028separator\u2029",
    "\u202egnp.exe",
    "nul\x00",
    "\x9b31m",
    'quote" event="forged',
    "back\\nslash",
    "\ud800",
)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    made = io.StringIO()
    yield made
    logger = logging.getLogger(NAME)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True


def written(stream: io.StringIO, form: Form, event: str = "joined", /, **facts: object) -> str:
    handler = log_to(stream, form, name=NAME)
    log(logging.getLogger(NAME), event, **facts)
    logging.getLogger(NAME).removeHandler(handler)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("value", HOSTILE)
def test_one_line_whatever_a_value_holds(stream: io.StringIO, form: Form, value: str) -> None:
    text = written(stream, form, "joined", client=value, seat=3)
    assert text.endswith("\n")
    assert len(text.splitlines()) == 1
    assert text[:-1].isprintable()
    text.encode("utf-8")  # what a file takes


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_hostile_event_and_fact_name_stay_on_the_line(stream: io.StringIO, form: Form) -> None:
    text = written(stream, form, "joined\nforged", **{"na\nme": 1, "event": "other"})
    assert len(text.splitlines()) == 1
    if form == "json":
        assert json.loads(text)["event"] == "joined\\nforged"
        assert json.loads(text)["event_"] == "other"


def test_json_lines_read_back(stream: io.StringIO) -> None:
    line: dict[str, Any] = json.loads(written(stream, "json", "round done", seat=3, round=7, loss=2.5, ok=True, cuts=[1, 2], left=None))
    assert line.pop("utc").endswith("Z")
    assert line == {
        "level": "info", "logger": NAME, "event": "round done", "seat": 3, "round": 7, "loss": 2.5, "ok": True, "cuts": [1, 2], "left": None
    }  # fmt: skip


def test_quotes_in_text_form_cannot_forge_a_fact(stream: io.StringIO) -> None:
    text = written(stream, "text", "joined", client='a" seat="9', seat=3)
    assert 'client="a\\" seat=\\"9" seat=3' in text


@pytest.mark.parametrize("form", ["json", "text"])
def test_private_things_are_not_written(stream: io.StringIO, form: Form) -> None:
    import numpy as np
    import torch

    text = written(
        stream,
        form,
        "step",
        activations=torch.full((2, 2), 4242.0),
        gradients=np.full(3, 4242.0),
        payload=b"4242 bytes",
        rows=[torch.tensor([4242])],
        record={"text": "4242"},
        token="4242-enrol",
        private_key="4242-key",
        note="-----BEGIN PRIVATE KEY-----4242",
    )
    assert "4242" not in text
    assert "<Tensor>" in text
    assert "<ndarray>" in text
    assert "<bytes>" in text
    assert "(withheld)" in text


def test_numbers_that_json_has_no_word_for_are_text(stream: io.StringIO) -> None:
    assert json.loads(written(stream, "json", loss=float("nan"), norm=float("inf"))) | {"loss": "nan", "norm": "inf"} == json.loads(
        stream.getvalue()
    )


def test_a_fault_says_where_and_nothing_of_the_values(stream: io.StringIO) -> None:
    handler = log_to(stream, "json", name=NAME)
    secret = "canary text"
    try:
        int(secret[:0])
    except ValueError:
        logging.getLogger(NAME).exception("it failed")
    logging.getLogger(NAME).removeHandler(handler)
    line = json.loads(stream.getvalue())
    assert len(stream.getvalue().splitlines()) == 1
    assert line["error"].startswith("ValueError")
    assert line["trace"][-1].startswith("test_logs.py:")
    assert secret not in stream.getvalue()


def test_long_values_and_many_are_cut(stream: io.StringIO) -> None:
    text = written(stream, "json", "joined", name="x" * 100_000, items=list(range(10_000)), **{f"fact_{n}": n for n in range(500)})
    assert len(text) < 3000
    assert json.loads(text)["items"][-1] == "and 9984 more"


@given(st.text(), st.integers(1, 50))
def test_one_line_is_printable_and_bounded(text: str, limit: int) -> None:
    shown = one_line(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit


@given(st.text(max_size=30), st.text(max_size=30))
def test_different_texts_stay_different(one: str, other: str) -> None:
    assert (one_line(one) == one_line(other)) == (one == other)


def test_what_is_below_the_level_costs_nothing(stream: io.StringIO) -> None:
    log_to(stream, "text", logging.WARNING, NAME)
    log(logging.getLogger(NAME), "quiet")
    assert stream.getvalue() == ""
