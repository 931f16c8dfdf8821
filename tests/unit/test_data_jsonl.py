from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from splitft.data.base import Document, Segment
from splitft.data.hub import HubDataset
from splitft.data.jsonl import JsonLines
from splitft.errors import DataError, MissingExtraError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def load(path: Path, *lines: str | dict[str, Any], **fields: Any) -> list[Document]:
    (path / "a.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return list(JsonLines(str(path / "a.jsonl"), **fields).documents())


def test_text_records_keep_scalar_columns(tmp_path: Path) -> None:
    record = {"text": "x", "label": 3, "score": 0.5, "good": True, "none": None, "list": [1]}
    (document,) = load(tmp_path, record)
    assert document.segments == (Segment("x", trained=True),)
    assert document.columns == {"text": "x", "label": "3", "score": "0.5", "good": "true"}
    assert (document.owner, document.origin) == ("a", f"{tmp_path}/a.jsonl:1")


@pytest.mark.parametrize(
    ("prompt", "completion", "context"),
    [("Q", "A", "Q\n"), ("Q ", "A", "Q "), ("Q", " A", "Q"), ("", "A", ""), ("Q\n", "A", "Q\n")],
)
def test_pairs_train_the_completion_only(tmp_path: Path, prompt: str, completion: str, context: str) -> None:
    (document,) = load(tmp_path, {"mr": prompt, "ref": completion}, prompt="mr", completion="ref")
    assert document.segments == (Segment(context, trained=False), Segment(completion, trained=True))


def test_joint_is_configurable(tmp_path: Path) -> None:
    (document,) = load(tmp_path, {"prompt": "Q", "completion": "A"}, joint=" || ")
    assert document.segments[0].text == "Q || "


def test_conversations_are_kept_whole(tmp_path: Path) -> None:
    (document,) = load(tmp_path, {"messages": CHAT, "topic": "t"})
    assert document.messages == tuple(CHAT)
    assert document.segments == ()
    assert document.columns == {"topic": "t"}


def test_the_form_is_told_per_file_and_can_be_switched_off(tmp_path: Path) -> None:
    record = {"messages": CHAT, "prompt": "p", "completion": "c", "text": "t"}
    assert load(tmp_path, record)[0].messages
    assert load(tmp_path, record, messages="")[0].segments[1].text == "c"
    assert load(tmp_path, record, messages="", prompt="")[0].segments == (Segment("t", trained=True),)
    (tmp_path / "b.jsonl").write_text('{"text": "t"}')
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    first, second = JsonLines(str(tmp_path)).documents()
    assert first.messages
    assert second.segments


def test_owner_field(tmp_path: Path) -> None:
    documents = load(tmp_path, {"text": "a", "who": "X"}, {"text": "b", "who": 2}, owner="who")
    assert [document.owner for document in documents] == ["X", "2"]
    with pytest.raises(DataError, match=r"a\.jsonl:2: no scalar field 'who'.*It has: text"):
        load(tmp_path, {"text": "a", "who": "X"}, {"text": "b"}, owner="who")


def test_blank_lines_texts_and_completions_are_skipped(tmp_path: Path) -> None:
    assert [document.origin[-2:] for document in load(tmp_path, "", {"text": " "}, {"text": "b"}, "")] == [":3"]
    assert len(load(tmp_path, {"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "b"})) == 1


@pytest.mark.parametrize("lines", [[], [{"text": ""}], [{"prompt": "p", "completion": " "}]])
def test_a_file_without_documents_is_refused(tmp_path: Path, lines: list[Any]) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: the file holds no record with text"):
        load(tmp_path, *lines)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('{"text": "b"', r"a\.jsonl:2: not valid JSON \(Expecting ',' delimiter at character 13\)"),
        ('["text"]', r"a\.jsonl:2: a JSON list, not an object"),
        ("[" * 100_000, r"a\.jsonl:2: JSON that cannot be read"),
        ('{"text": ' + "9" * 5000 + "}", r"a\.jsonl:2: JSON that cannot be read"),
        ('{"txt": "b"}', r"a\.jsonl:2: no field 'text', though the first record has it; this one has 'txt'"),
        ('{"text": 5}', r"a\.jsonl:2: field 'text' is int, not text"),
        ('{"text": "\\ud800"}', r"a\.jsonl:2: field 'text' holds half a character"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, wanted: str) -> None:
    with pytest.raises(DataError, match=wanted):
        load(tmp_path, {"text": "good"}, line)


def test_unknown_fields_are_listed_with_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: the record has the fields 'question', 'answer', but needs 'messages'.*data\.prompt"):
        load(tmp_path, {"question": "q", "answer": "a"})


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ("text", "is not a list of messages"),
        ([], "is not a list of messages"),
        ([{"role": "user"}], "message 0 of 'messages' has no text"),
        ([*CHAT, {"role": "assistant", "content": None}], "message 2 of 'messages' has no text"),
        (["hi"], "message 0"),
        (CHAT[:1], "no answer of the assistant"),
        ([CHAT[0], {"role": "assistant", "content": " "}], "no answer of the assistant"),
        ([CHAT[0], {"role": "assistant", "content": "\ud800"}], "half a character"),
    ],
)
def test_bad_conversations_are_named(tmp_path: Path, messages: Any, wanted: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{wanted}"):
        load(tmp_path, {"messages": messages})


def fake_datasets(monkeypatch: pytest.MonkeyPatch, records: list[dict[str, Any]] | Exception) -> list[tuple[Any, ...]]:
    """A stand-in for the library `datasets`; returns the list of calls made to it."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> list[dict[str, Any]]:
        calls.append((path, name, options))
        if isinstance(records, Exception):
            raise records
        return records

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_records_become_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_datasets(monkeypatch, [{"text": "", "label": 1}, {"text": "x", "label": 2}])
    (document,) = HubDataset("team/set", split="test", config_name="small").documents()
    assert calls == [("team/set", "small", {"split": "test", "revision": None})]
    assert (document.segments[0].text, document.columns["label"], document.origin) == ("x", "2", "team/set[test]:2")


def test_hub_failures_are_data_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, ConnectionError("no network\nlong story"))
    with pytest.raises(DataError, match=r"team/set \(config default, split train\).*ConnectionError: no network Check"):
        list(HubDataset("team/set").documents())
    fake_datasets(monkeypatch, [{"text": ""}])
    with pytest.raises(DataError, match="split 'train' holds no record"):
        list(HubDataset("team/set").documents())


def test_hub_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "splitft\[data\]"'):
        list(HubDataset("team/set").documents())
