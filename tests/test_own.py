"""Hypotheses that a person wrote: files of strangers, tests on a finished run, the report."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted import SIDE, drawing

import MNIST_SAE_code as driver
from saexplain import own
from saexplain.evaluation import Rule, collect_evidence, decide, evaluate_hypotheses
from saexplain.evaluation import split_test_images as halves_of
from saexplain.files import STAGING, BusyError, InputError, folder_lock, read_json
from saexplain.hypotheses import drawing_rows, hypothesis_record
from saexplain.ink import Canvas
from saexplain.own import FORMAT, read_hypotheses, write_hypotheses

STEM = np.zeros((SIDE, SIDE), dtype=int)
STEM[6:22, 13:15], STEM[6:22, 5:8] = 2, -1
ENTRY = {"feature": 3, "drawing": ["+."]}
MARKUP = "<script>alert(1)</script>\n# |[x](javascript:y)`*_ ![i](j)"


def write(path, hypotheses, **more) -> None:
    path.write_text(json.dumps({"format": FORMAT, "hypotheses": hypotheses, **more}))


# --- Files ----------------------------------------------------------------------------------------


def test_hypotheses_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "mine.json"
    full = {"classes": (1, 7), "raises": 1, "lowers": 4, "confidence": "High", "threshold": -3}
    some = [drawing(3, STEM, caption="vertical line", **full), drawing(3, STEM.T)]
    write_hypotheses(some, path)
    found = read_hypotheses(path)
    assert [hypothesis_record(h) for h in found] == [hypothesis_record(h) for h in some]


def test_entries_need_a_feature_and_a_drawing_and_may_have_unknown_keys(tmp_path):
    path = tmp_path / "mine.json"
    write(path, [{**ENTRY, "tries": 4, "tested": {"f1": [1]}, "raises": None}], source="a page")
    (h,) = read_hypotheses(path)
    assert (h.feature, h.weights.tolist(), h.raises, h.threshold) == (3, [[1, 0]], None, None)


def test_files_may_be_as_large_as_the_limits(tmp_path):
    path = tmp_path / "mine.json"
    write(path, [{**ENTRY, "caption": "x" * 300}] * 10_000)
    content = path.read_text()
    path.write_text(content + " " * (20_000_000 - len(content)))
    assert len(read_hypotheses(path)) == 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        ("[]", 'must be a JSON object with "format"'),
        ('{"format": "saexplain hypotheses 2"}', 'must be a JSON object with "format"'),
        ([], 'a list of 1 to 10,000 "hypotheses"'),
        ({}, "a list of 1 to"),
        ([ENTRY] * 10_001, "a list of 1 to"),
        (" " * 20_000_001, "must have at most 20,000,000 bytes"),
        ([ENTRY, 3], "hypothesis 2 must be a JSON object, got 3"),
        ([{"drawing": ["+"]}], "hypothesis 1 must have 'feature'"),
        ([{"feature": 1}], "hypothesis 1 must have 'drawing'"),
        ([{**ENTRY, "drawing": "++"}], "drawing must be a list of text"),
        ([{**ENTRY, "drawing": [["+"]]}], "drawing must be a list of text"),
        ([{**ENTRY, "drawing": []}], "rows of one length"),
        ([{**ENTRY, "drawing": ["", ""]}], r"shape \(h, w\)"),
        ([{**ENTRY, "drawing": ["+.", "+"]}], "rows of one length"),
        ([{**ENTRY, "drawing": ["<b>"]}], "only the characters"),
        ([{**ENTRY, "feature": "3"}], "feature must be"),
        ([{**ENTRY, "feature": True}], "feature must be a whole number, got True"),
        ([{**ENTRY, "raises": False}], "raises must be a whole number, got False"),
        ([{**ENTRY, "classes": 1}], "hypothesis 1: "),
        ([{**ENTRY, "classes": "12"}], "a class must be"),
        ([{**ENTRY, "raises": 1.5}], "raises must be"),
        ([{**ENTRY, "confidence": "Sure"}], "confidence must be one of"),
        ([{**ENTRY, "confidence": ["High"]}], "confidence must be one of"),
        ([{**ENTRY, "threshold": "5"}], "threshold must be"),
        ([{**ENTRY, "threshold": 1e400}], "threshold must be"),
        ([{**ENTRY, "caption": "x" * 301}], "caption must be text of at most 300 characters"),
        ([{**ENTRY, "caption": {"a": 1}}], "caption must be text"),
    ],
)
def test_files_that_hold_no_hypotheses_are_an_error_of_one_line(tmp_path, content, message):
    path = tmp_path / "mine.json"
    if isinstance(content, (list, dict)):
        write(path, content)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        read_hypotheses(path)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


SAES = [SimpleNamespace(W_enc=torch.full((2, 3), value)) for value in (0.0, 1.0)]


def test_tries_are_different_drawings_of_a_feature(tmp_path):
    a, b, c = drawing(3, STEM), drawing(3, STEM.T), drawing(4, STEM)
    assert own.count_tries([a, b, c], tmp_path, SAES[0]) == [1, 2, 1]
    assert own.count_tries([drawing(3, STEM, caption="another"), c], tmp_path, SAES[0]) == [1, 1]
    assert own.count_tries([a], tmp_path, SAES[1]) == [1]  # of another run in the folder
    assert own.count_tries([drawing(3, STEM[:, ::-1]), b], tmp_path, SAES[0]) == [3, 2]
    for damaged in ("{", "[1]", '{"3": 1}', '{"3": ["x"]}', '{"x": {"3": 1}}'):
        (tmp_path / own.TRIES_FILE).write_text(damaged)
        with pytest.raises(InputError, match="move it away"):
            own.count_tries([a], tmp_path, SAES[0])


# --- On a finished run ----------------------------------------------------------------------------


@pytest.fixture
def tested(run_copy, tmp_path, capsys):
    """A run on which five hypotheses were tested by the command line: those read, the records that
    it returned, the folder, and what it printed."""
    machine = {h["feature"]: h for h in read_json(run_copy / "hypotheses.json")["hypotheses"]}
    k = read_json(run_copy / "feature_report.json")[0]["feature"]
    rows = machine[k]["drawing"]
    stem = drawing_rows(STEM)
    given = [
        {"feature": k, "drawing": rows, "confidence": "High", "classes": machine[k]["classes"]},
        {"feature": k, "drawing": stem, "caption": MARKUP, "confidence": "Low", "raises": 1},
        {"feature": 5, "drawing": stem, "confidence": "High", "threshold": 1234},
        {"feature": 6, "drawing": ["." * SIDE] * SIDE, "classes": [0, 1]},
    ]
    write(tmp_path / "mine.json", given)
    flags = ["--my-hypotheses", str(tmp_path / "mine.json"), "--out", str(run_copy)]
    records = driver.main(flags)
    return read_hypotheses(tmp_path / "mine.json"), records, run_copy, capsys.readouterr().out


def test_a_run_tests_hypotheses_of_ones_own_like_its_own(tested, loaded):
    hypotheses, records, folder, printed = tested
    layer = loaded.layer
    test, _ = halves_of(layer.splits["test"])
    expected = evaluate_hypotheses(hypotheses, layer, test.images, test.labels)
    results = own.evaluate_own(hypotheses, layer, folder)
    for r, record in zip(results, records, strict=True):
        assert record == hypothesis_record(r.hypothesis) | {"found": r.row.decision.confidence}
    assert [r.row.evidence for r in results] == expected
    machine = {h["feature"]: h for h in read_json(folder / "hypotheses.json")["hypotheses"]}
    assert records[0]["threshold"] == machine[records[0]["feature"]]["threshold"]
    entry = read_json(folder / "feature_report.json")[0]
    assert entry["f1"] == expected[0].f1
    assert entry["evidence"]["edits"]["erasing"]["named"] == expected[0].edits["erasing"].named
    assert results[0].row.decision.confidence == entry["confidence"]
    assert results[0].row.replicated == entry["replicated"]
    assert [records[2]["threshold"], results[3].row.decision.confidence] == [1234, "Low"]
    lines = printed.splitlines()
    assert len(lines) == 5  # the target is named where there are several
    for line, e in zip(lines[:3], expected[:3], strict=True):
        assert f"F1 {e.picked.f1:.2f}" in line
        assert decide(e).confidence in line


def test_the_report_has_a_section_and_a_picture_of_each(tested, loaded):
    hypotheses, records, folder, _ = tested
    k = hypotheses[0].feature
    page = (folder / "my_hypotheses.md").read_text()
    sections = page.split("\n## ")[1:]
    assert [s.split(":")[0] for s in sections] == [f"Feature {n}" for n in (k, k, 5, 6)]
    pictures = [
        f"my_hypothesis_1_feature_{k}.png",
        f"my_hypothesis_2_feature_{k}.png",
        "my_hypothesis_3_feature_5.png",
    ]
    for name, section in zip([*pictures, "my_hypothesis_4_feature_6.png"], sections, strict=True):
        assert f"]({name})" in section
        assert (folder / name).stat().st_size > 1000
    assert "Drawing number 2 of this feature" in sections[1]
    assert "Drawing number" not in sections[0] + sections[2] + sections[3]
    evaluated = read_json(folder / "feature_report.json")[0]
    assert f"own: {evaluated['caption']}: F1 {evaluated['f1']:.2f}" in sections[1]
    for section, h in zip(sections, hypotheses, strict=True):
        assert f"by its author: {h.confidence or 'none'}" in section
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    results = own.evaluate_own(hypotheses, loaded.layer, folder)
    tested_ones = [r for r in results if r.row.evidence.picked]  # the others deserve nothing
    assert [r["found"] for r in records] == [r.row.decision.confidence for r in results]
    expected = {}
    for r in tested_ones:
        of_name = expected.setdefault(r.hypothesis.confidence or "none given", [])
        of_name.append(r.row.decision.confidence)
    assert {row[0] for row in table[2:]} == expected.keys()
    for name, some in expected.items():
        counts = [str(some.count(confidence)) for confidence in ("High", "Medium", "Low")]
        assert [name, *counts] in table
    assert "own:" not in own.own_markdown(results, [], ())


def test_markup_in_captions_is_inert(tested):
    page = (tested[2] / "my_hypotheses.md").read_text()
    (title,) = [line for line in page.splitlines() if "script" in line]
    assert title.startswith("## Feature ")
    assert "<" not in page.replace("&lt;", "")
    plain = title
    for character in "\\`*_{}[]>#|":
        plain = plain.replace(f"\\{character}", "")
    assert not set("`*[]|>") & set(plain)
    assert own.escaped("a & b\n\t<i>") == "a &amp; b &lt;i\\>"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (ENTRY, r"shape \(28, 28\), got \(1, 2\)"),
        ({"feature": 32, "drawing": drawing_rows(STEM)}, "feature 32 does not exist"),
        ({"feature": 1, "drawing": drawing_rows(STEM), "raises": 10}, "0 to 9, got 10"),
    ],
)
def test_hypotheses_that_do_not_fit_the_run_are_not_counted(run_copy, tmp_path, entry, message):
    write(tmp_path / "mine.json", [entry])
    flags = ["--my-hypotheses", str(tmp_path / "mine.json"), "--out", str(run_copy)]
    with pytest.raises(InputError, match=message):
        driver.main(flags)
    assert not list(run_copy.glob("my_hypo*"))


def test_missing_runs_and_files_are_named(finished, tmp_path):
    write(tmp_path / "mine.json", [ENTRY])
    for name, out, message in (
        ("mine.json", tmp_path, "has no finished run"),
        ("no.json", finished, "no.json cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            driver.main(["--my-hypotheses", str(tmp_path / name), "--out", str(out)])


def test_a_target_that_the_run_lacks_is_an_error(finished, tmp_path):
    write(tmp_path / "mine.json", [ENTRY])
    flags = ["--my-hypotheses", str(tmp_path / "mine.json"), "--out", str(finished)]
    with pytest.raises(InputError, match=r"target must be one of \[4\], .* got 10"):
        driver.main([*flags, "--target-actives", "10"])


def test_nothing_is_read_while_another_process_writes(run_copy, tmp_path):
    flags = ["--my-hypotheses", str(tmp_path / "none.json"), "--out", str(run_copy)]
    with folder_lock(run_copy), pytest.raises(BusyError):
        driver.main(flags)
    with pytest.raises(InputError, match=r"none\.json cannot be read"):
        driver.main(flags)


def test_a_run_that_is_complete_replaces_the_old_one_before_the_tests(run_copy, tmp_path):
    """The new run is not of this folder's images, so that it is known which one is read."""
    staging = run_copy / STAGING
    staging.mkdir()
    manifest = read_json(run_copy / "settings.json")
    (staging / "settings.json").write_text(json.dumps({**manifest, "data_digest": "another"}))
    write(tmp_path / "mine.json", [ENTRY])
    flags = ["--my-hypotheses", str(tmp_path / "mine.json"), "--out", str(run_copy)]
    with pytest.raises(InputError, match="was made with"):
        driver.main(flags)
    assert not staging.exists()


def test_hypotheses_about_one_feature_keep_the_order_given(loaded, tmp_path):
    some = [drawing(2, STEM, threshold=t) for t in (9000, 100, 4000)]
    found = own.evaluate_own(some, loaded.layer, tmp_path)
    test, again = halves_of(loaded.layer.splits["test"])
    canvas = Canvas.fit(loaded.layer.splits["val"].images)
    for h, r in zip(some, found, strict=True):
        (e,) = collect_evidence([h], loaded.layer, test, canvas)
        (other,) = collect_evidence([h], loaded.layer, again, canvas, in_full=False)
        assert r.row.again == other
        # Products of one column round otherwise than those of several.
        assert r.row.evidence.correlation == pytest.approx(e.correlation, abs=1e-6)
        assert r.row.evidence._replace(correlation=0) == e._replace(correlation=0)
        assert r.row == type(r.row).of(r.row.evidence, other, Rule())
    assert len({r.row.evidence.picked.n for r in found}) == 3
