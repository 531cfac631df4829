"""Files as people have them: every dialect and encoding gives the same rows; what is wrong names its line."""

import json
from pathlib import Path

import pytest

import lens_defense as ld
from lens_defense.prompts.table_files import BadRow, numbered_rows, read_text

pytestmark = pytest.mark.filterwarnings("ignore:these requests have no subjects")
SHARED = Path(__file__).parents[3] / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"there is no folder {SHARED}")
PLAIN = 'text,subject\n"café, 007",007\nthe NA,NA\n'
WANTED = [(2, {"text": "café, 007", "subject": "007"}), (3, {"text": "the NA", "subject": "NA"})]


def rows_of(path, content, encoding="utf-8"):
    """The rows of a file of this content."""
    path.write_bytes(content.encode(encoding))
    return list(numbered_rows(path))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_encoding_and_line_end(encoding, end, tmp_path):
    assert rows_of(tmp_path / "a.csv", PLAIN.replace("\n", end), encoding) == WANTED


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("said", [False, True])
def test_every_delimiter(delimiter, said, tmp_path):
    content = f'text{delimiter}subject\n"café, 007"{delimiter}007\nthe NA{delimiter}NA\n'
    lines = 1 if said else 0
    rows = rows_of(tmp_path / "a.CSV", f"sep={delimiter}\n" * lines + content)
    assert rows == [(line + lines, row) for line, row in WANTED]


def test_cells_stay_text(tmp_path):
    rows = rows_of(tmp_path / "a.csv", "text,subject\nnull,\n1080,True\n1e3,nan\n")
    assert [tuple(row.values()) for _, row in rows] == [("null", None), ("1080", "True"), ("1e3", "nan")]


def test_a_row_of_another_length_names_its_line(tmp_path):
    rows = rows_of(tmp_path / "a.csv", 'text,subject\n"two\nlines",b\nhow, why,b\nalone\nc,d\n')
    assert [line for line, _ in rows] == [2, 4, 5, 6]
    assert isinstance(rows[1][1], BadRow)
    assert "3 fields, where the first line has 2" in str(rows[1][1])
    assert isinstance(rows[2][1], BadRow)
    assert rows[3][1] == {"text": "c", "subject": "d"}


def test_an_open_quote_names_the_line_where_it_opens(tmp_path):
    rows = rows_of(tmp_path / "a.csv", 'text,subject\na,b\n"c,d\ne,f\n')
    assert rows[0] == (2, {"text": "a", "subject": "b"})
    assert rows[1][0] == 3
    assert isinstance(rows[1][1], BadRow)
    assert rows[2:] == [(4, {"text": "e", "subject": "f"})]


def test_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="line 1: two columns are called 'text'"):
        rows_of(tmp_path / "a.csv", "text,text\na,b\n")


@pytest.mark.parametrize(
    "content",
    [
        '[{"a": 1}, {"a": 2}]',
        '{"a": [1, 2]}',
        '{"version": 3, "rows": [{"a": 1}, {"a": 2}]}',
        '{"a": 1}\n{"a": 2}\n',
    ],
    ids=["list", "columns", "inside an object", "an object per line"],
)
def test_every_form_of_json(content, tmp_path):
    assert rows_of(tmp_path / "a.json", content) == [(1, {"a": 1}), (2, {"a": 2})]


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(bytes([0xFF, 0xFE, 0x00]))
    with pytest.raises(ValueError, match="is no text in UTF-8, UTF-16 or cp1252"):
        read_text(path)


PUBLISHED = {
    "HarmBench": {"Behavior": "light a lamp", "SemanticCategory": "light", "BehaviorID": "lamp_1"},
    "AdvBench": {"goal": "light a lamp", "target": "Sure, here is a lamp"},
    "JailbreakBench": {
        "": "0",
        "Goal": "light a lamp",
        "Target": "Sure",
        "Category": "light",
        "Source": "own",
    },
    "StrongREJECT": {"category": "light", "source": "own", "forbidden_prompt": "light a lamp"},
    "XSTest": {"id_v2": "v2-1", "type": "light", "prompt": "light a lamp", "focus": "lamp"},
    "SORRY-Bench": {"question_id": 1, "category": "light", "turns": ["light a lamp"]},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_columns_are_known(name, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PUBLISHED[name]), "utf-8")
    (item,) = ld.requests(path)
    assert (item.text, item.subject) == ("light a lamp", None)
    assert item.category == ("" if name == "AdvBench" else "light")
    (marked,) = ld.requests(path, subject=lambda row: row and "lamp")
    assert marked.subject == "lamp"


def test_labels_are_kinds(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,label\nkill a process,safe\nkill a lamp,unsafe\nlight it,7\n", "utf-8")
    assert [item.text for item in ld.requests(path, kind="safe")] == ["kill a process"]
    assert [item.text for item in ld.requests(path)] == ["kill a lamp", "light it"]


def test_counterfact_and_zsre(tmp_path):
    path = tmp_path / "rows.json"
    rewrite = {"prompt": "{} is lit by", "subject": "The lamp", "target_new": {"str": "gas"}}
    rows = [
        {"case_id": 3, "requested_rewrite": {**rewrite, "target_true": {"str": "oil"}}},
        {"src": "What lights the lamp?", "subject": "lamp", "answers": ["oil"], "alt": "gas"},
    ]
    path.write_text(json.dumps(rows), "utf-8")
    question, fact = ld.requests(path, distinct=False)
    assert (question.text, question.subject) == ("What lights the lamp?", "lamp")
    assert (fact.id, fact.text) == ("rewrite-3", "The lamp is lit by")
    assert (fact.target, fact.safe_target) == ("oil", "gas")


def test_no_known_column_says_which_there_are(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("frage,thema\nwas ist das,das\n", "utf-8")
    with pytest.raises(ValueError, match=r"there are 'frage', 'thema'; .* text='frage'"):
        ld.requests(path)
    assert ld.requests(path, text="frage", subject="thema")[0].subject == "das"


@needs_shared
@pytest.mark.parametrize(
    "file, rows",
    [
        ("harmbench/harmbench_val.csv", 80),
        ("harmbench/harmbench_test.csv", 320),
        ("advbench/harmful_behaviors.csv", 520),
        ("jailbreakbench/behaviors.csv", 100),
        ("strongreject/strongreject.csv", 313),
        ("xstest/xstest_v2_prompts.csv", 450),
        ("benign/vicuna_bench.jsonl", 80),
        ("smoothllm_gcg/vicuna_behaviors.json", 10),
    ],
)
def test_published_files_are_read_whole(file, rows):
    assert len(ld.requests(SHARED / file, strict=True, distinct=False)) == rows
