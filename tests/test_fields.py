"""docs/fields.md explains every field of a real run, and none that no run has."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from saexplain.files import read_json
from saexplain.runs import OWN_FILES

DOCS = Path(__file__).resolve().parent.parent / "docs" / "fields.md"
SHORT = {"settings.json", "hypotheses.json"}  # of which the first level is explained


def documented(name: str) -> dict[str, list[str]]:
    """The other cells of each row of the table of a file, by field."""
    section = re.split(r"^## ", DOCS.read_text(), flags=re.MULTILINE)
    (table,) = [part for part in section if part.startswith(name)]
    rows = re.findall(r"^\| `([^`]+)` \|(.*)\|$", table, re.MULTILINE)
    assert len(dict(rows)) == len(rows)  # none twice
    return {field: [cell.strip() for cell in cells.split("|")] for field, cells in rows}


def fields_of(value: object, at: str = "") -> Iterator[str]:
    """The fields of a record that have values of their own."""
    records = isinstance(value, list) and value and isinstance(value[0], dict)
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from fields_of(inner, f"{at}.{key}" if at else key)
    elif records:
        for inner in value:
            yield from fields_of(inner, f"{at}[]")
    elif value not in (None, {}) or not at.startswith("evidence"):  # a test that was not possible
        yield at


def is_explained(field: str, pattern: str) -> bool:
    parts = [".*" if part == "*" else re.escape(part) for part in re.split(r"(\*)", pattern)]
    return bool(re.fullmatch("".join(parts), field))


def check_explained(folder: Path, name: str) -> tuple[dict[str, list[str]], set[str]]:
    """The rows of the table of a file, and the fields of its records, which have one each."""
    rows, found = documented(name), set()
    for record in read_json(folder / name):
        found |= set(fields_of(record))
    assert len(found) > 50
    assert [f for f in sorted(found) if not any(is_explained(f, row) for row in rows)] == []
    return rows, found


@pytest.mark.parametrize("name", ["feature_report.json", "summary.json"])
def test_every_field_of_a_run_is_explained_and_no_other(finished, name):
    rows, found = check_explained(finished, name)
    usual = [row for row, (meaning, *_) in rows.items() if not meaning.startswith("*")]
    assert [row for row in usual if not any(is_explained(f, row) for f in found)] == []
    assert all(len(cells) == 3 for cells in rows.values())  # meaning, unit and shape, images


@pytest.mark.parametrize("name", sorted(SHORT))
def test_the_other_files_are_explained_at_their_first_level(finished, name):
    text = DOCS.read_text()
    line = "".join(re.findall(rf"^\| `{name}`: (.*) \|$", text, re.MULTILINE))
    assert set(read_json(finished / name)) == set(re.findall(r"`(\w+)`", line)) - {"hypothesis"}


def test_fields_that_are_called_equal_are_equal(finished):
    for record in read_json(finished / "feature_report.json"):
        assert record["caption"] == record["hypothesis"]["caption"]
        assert record["hypothesis"]["confidence"] == ""
        if record["evidence"]["picked"]:
            assert record["f1"] == record["evidence"]["picked"]["f1"]
    (record,) = read_json(finished / "summary.json")
    own = record["hypotheses"]["summaries"]["SAE"]
    for name in ("agreement_hypotheses", "f1_by_influence", "f1_mean"):
        assert record[name] == own[name]
    assert record["hypotheses_sha256"] == record["hypotheses"]["sha256"]


def test_each_file_of_a_run_is_named_in_its_list(finished):
    table = re.findall(r"^\| (`.*`) \|", (finished / "FILES.md").read_text(), re.MULTILINE)
    patterns = []
    for name in re.findall(r"`([^`]+)`", " ".join(table)):
        name = name + "*" if name.endswith("/") else name
        patterns.append(re.escape(name).replace("N", r"\d+").replace(r"\*", ".*"))
    names = [path.relative_to(finished).as_posix() for path in finished.rglob("*")]
    own = [name for name in names if OWN_FILES.fullmatch(name) and name != "FILES.md"]
    assert len(own) > 50
    assert [n for n in own if not any(re.fullmatch(p, n) for p in patterns)] == []
