from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from splitft.data.python_docs import PythonDocs
from splitft.errors import ConfigError, DataError

SOURCE = '''"""Module doc, long enough."""
from __future__ import annotations
import does_not_exist

class Thing:
    """Class doc, long enough.

    More:
        indented
    """

    def method(self):
        """Method doc, long enough."""

if True:
    async def late():
        """Nested doc, long enough."""
else:
    def twice():
        """Nested doc, long enough."""

def short():
    """Short."""
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of our own in place of Python's."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def test_docstrings_are_found_cleaned_and_owned(library: Path) -> None:
    write(library / "package" / "module.py", SOURCE)
    documents = list(PythonDocs(min_characters=12).documents())
    assert [(document.segments[0].text, document.origin) for document in documents] == [
        ("Module doc, long enough.", "package/module.py:1"),
        ("Class doc, long enough.\n\nMore:\n    indented", "package/module.py:6"),
        ("Method doc, long enough.", "package/module.py:13"),
        ("Nested doc, long enough.", "package/module.py:17"),
    ]
    assert {document.owner for document in documents} == {"package"}


def test_tests_foreign_and_broken_code_is_skipped(library: Path) -> None:
    for name in ("test/a.py", "site-packages/b.py", "idlelib/idle_test/c.py", "json/tests/d.py"):
        write(library / name, SOURCE)
    write(library / "broken.py", "def (")
    (library / "latin.py").write_bytes(b'"""caf\xe9"""')
    with pytest.raises(DataError, match=r'no documentation.*use data source "text"'):
        list(PythonDocs(min_characters=1).documents())


def test_topics_take_at_most_a_quarter(library: Path) -> None:
    write(library / "pydoc_data" / "topics.py", "# made\ntopics = {" + ", ".join(f"'t{n}': 'Topic number {n}'" for n in range(9)) + "}")
    write(library / "many.py", "".join(f'def f{n}():\n    """Function {n} of many."""\n' for n in range(20)))
    documents = list(PythonDocs(max_documents=8, min_characters=5).documents())
    assert [document.owner for document in documents] == ["pydoc_data"] * 2 + ["many"] * 6


def test_long_texts_are_cut(library: Path) -> None:
    write(library / "a.py", '"""' + "word " * 100 + '"""')
    (document,) = PythonDocs(min_characters=5, max_characters_per_document=20).documents()
    assert document.segments[0].text == "word word word word"


@pytest.mark.parametrize("field", ["max_documents", "min_characters", "max_characters_per_document"])
def test_fields_are_checked(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{field} is 0"):
        PythonDocs(**{field: 0})


def test_the_running_python_has_documentation() -> None:
    source = PythonDocs(max_documents=60, min_characters=200, max_characters_per_document=500)
    documents = list(source.documents())
    assert len(documents) == 60
    assert all(200 <= len(document.segments[0].text) <= 500 for document in documents)
    assert len({document.owner for document in documents}) > 3
    assert [document.digest() for document in documents] == [document.digest() for document in source.documents()]
    assert not any(Path(document.origin).is_absolute() for document in documents)
