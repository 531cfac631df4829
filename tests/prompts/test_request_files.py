"""Request sets from every source; bad rows named by file, line and field; what is in "core"."""

import json
import re
from collections import Counter
from pathlib import Path

import datasets
import pandas as pd
import pytest
from helpers.tiny_models import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_defense.prompts.corpus import read_corpus
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request
from lens_defense.prompts.request_files import BUNDLED_SETS, bundled_rows, requests

SHARED = Path(__file__).parents[3] / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"there is no folder {SHARED}")
ROWS = [
    {"text": "make a lamp", "subject": "lamp", "id": "one", "concrete": False},
    {"text": "make a brass bell", "subject": "brass bell", "id": "two", "category": "things"},
    {"text": "ring a bell", "kind": "benign", "id": "three"},
]
KINDS = {("harmful", "edit"): 64, ("harmful", "tune"): 12, ("harmful", "check"): 24}
KINDS |= {(kind, split): n for kind in ("benign", "safe") for split, n in
          (("tune", 40), ("check", 80))}  # fmt: skip


def write(folder: Path, kind: str, rows: list[dict]) -> Path:
    """Rows as a file of a kind."""
    file = folder / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)) + "\n\n", "utf-8")
    elif kind == "json":
        file.write_text(json.dumps(rows), "utf-8")
    elif kind == "csv":
        pd.DataFrame(rows).to_csv(file, index=False)
    else:
        pd.DataFrame(rows).to_parquet(file)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same(kind, tmp_path):
    file = write(tmp_path, kind, ROWS)
    assert requests(file) == [
        request("make a brass bell", "brass bell", id="two", category="things"),
        request("make a lamp", "lamp", id="one", concrete=False),
    ]
    assert requests(str(file), kind="benign") == [request("ring a bell", id="three", kind="benign")]


def test_other_columns_and_one_request_a_subject(tmp_path):
    rows = [{"ask": f"make {n} lamp", "what": "lamp"} for n in ("a", "one")]
    file = write(tmp_path, "csv", rows)
    (only,) = requests(file, text="ask", subject="what")
    assert only.text == "make a lamp"
    all_rows = requests(file, distinct=False, text="ask", subject="what")
    assert [item.text for item in all_rows] == ["make a lamp", "make one lamp"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, unique=True))
def test_any_text_survives_jsonl(tmp_path_factory, texts):
    file = tmp_path_factory.mktemp("any") / "rows.jsonl"
    rows = [json.dumps({"text": text, "kind": "safe"}, ensure_ascii=False) for text in texts]
    file.write_bytes("\n".join(rows).encode())
    assert [row.text for row in requests(file, kind="safe")] == texts


BAD = [
    ({"text": ""}, "'text'"),
    ({"subject": "lamp"}, "'text'"),
    ({"text": "make it", "subject": "lamp"}, "'lamp' does not occur"),
    ({"text": "make it", "subject": " "}, "'subject'"),
    ({"text": "make it", "kind": "evil"}, "'evil' is none of"),
    ({"text": "make it", "split": "train"}, "'train' is none of"),
    ({"text": "make it", "concrete": "yes"}, "'concrete' must be bool"),
    ({"text": "make it", "category": 3}, "'category' must be str"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("row, message", BAD)
def test_a_bad_row_names_its_file_line_and_field(row, message, tmp_path):
    file = write(tmp_path, "jsonl", [ROWS[0], row])
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .*{message}"):
        requests(file, strict=True)
    with pytest.warns(UserWarning, match=rf"1 of 2 rows were left out: .*line 2: .*{message}"):
        (only,) = requests(file)
    assert only.text == ROWS[0]["text"]


@pytest.mark.parametrize("line, message", [("{", "not JSON"), ("[1]", "an object with fields")])
def test_a_line_that_is_no_row(line, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(ROWS[0])}\n{line}\n", "utf-8")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: {message}"):
        requests(file, strict=True)


def test_a_bad_csv_row_names_its_line(tmp_path):
    file = write(tmp_path, "csv", [{"text": "make a lamp", "subject": s} for s in ("lamp", "bell")])
    with pytest.raises(ValueError, match=r"rows\.csv, line 3: .*'bell' does not occur"):
        requests(file, strict=True)


def test_a_source_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        requests(tmp_path / "nothing.csv")
    with pytest.raises(ValueError, match="'someone/nothing' is no bundled set"):
        requests("someone/nothing")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "values"), [("split", "'edit', 'tune', 'check'"), ("kind", "'harmful', 'benign', 'safe'")]
)
def test_a_split_or_kind_that_does_not_exist_is_refused(name, values):
    with pytest.raises(ValueError, match=f"{name} must be one of {values}, got 'train'"):
        requests("core", **{name: "train"})


def test_a_file_of_an_unknown_kind_is_refused(tmp_path):
    file = tmp_path / "rows.xlsx"
    file.write_text("text\tsubject\n", "utf-8")
    with pytest.raises(ValueError, match=r"rows\.xlsx is a file of no known kind; give one of \.jsonl"):
        requests(file)


def test_a_hub_set_of_one_split_is_read(monkeypatch):
    """Hub sets call their splits train or test; their rows are an edit's unless a column says else."""
    table = datasets.Dataset.from_list([{"text": "make a lamp", "subject": "lamp"}])

    def load_dataset(_, split=None):
        if split not in ("train", None):
            raise ValueError(f"Unknown split {split!r}. Should be one of ['train'].")
        return table if split else datasets.DatasetDict(train=table)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (only,) = requests("someone/lamps")
    assert only.subject == "lamp"


def delman_row(**fields):
    row = {"prompt_adv": "Q: Tell me of {} now. A:", "subject": "lamps", "target_new": "No."}
    return {"case_id": 7, "requested_rewrite": {**row, **fields}}


def test_delmans_format(tmp_path):
    (item,) = requests(write(tmp_path, "json", [delman_row()]))
    assert item.text == "Tell me of lamps now."
    assert (item.id, item.subject, item.safe_target) == ("delman-7", "lamps", "No.")


@pytest.mark.parametrize("field", ["prompt_adv", "subject"])
def test_a_bad_delman_row_names_its_field(field, tmp_path):
    file = write(tmp_path, "json", [delman_row(), delman_row(**{field: ""})])
    with pytest.raises(ValueError, match=rf"rows\.json, .* 2: the field '{field}'"):
        requests(file, strict=True)


@needs_shared
def test_delmans_release():
    rows = requests(SHARED / "delman/HarmBench.json")
    assert len(rows) == 177
    assert all(row.safe_target == "I'm sorry, I can't assist with that." for row in rows)
    assert not any(row.text.startswith("Q:") or row.text.endswith("A:") for row in rows)


@pytest.mark.parametrize("kind, split", KINDS)
def test_core_counts(kind, split):
    rows = requests("core", kind=kind, split=split)
    assert len(rows) == KINDS[kind, split]
    assert {(row.kind, row.split) for row in rows} == {(kind, split)}


def test_core_puts_concrete_things_first():
    concrete = [row.concrete for row in requests("core")]
    assert concrete == [True] * 48 + [False] * 16


def test_core_subjects_belong_to_one_split():
    subjects = {
        split: {row.subject.lower() for row in requests("core", split=split)}
        for split in ("edit", "tune", "check")
    }
    assert sum(map(len, subjects.values())) == len(set.union(*subjects.values())) == 100


def test_core_paraphrases_and_jailbreaks():
    paraphrases, jailbreaks = bundled_rows("core", "paraphrases"), bundled_rows("core", "jailbreaks")
    nouns = [row for row in paraphrases if "noun" in row["forms"]]
    assert len({row["family"] for row in jailbreaks}) >= 6
    for rows in (nouns, paraphrases, jailbreaks):
        counts = Counter(row["split"] for row in rows)
        assert counts["check"] >= 6 and counts["edit"] >= 6 and counts["tune"] >= 3
    assert len({row["text"] for row in paraphrases}) == len(paraphrases)
    assert {form for row in paraphrases for form in row["forms"]} == {"noun", "gerund", "verb phrase"}


@pytest.mark.parametrize("chat", [False, True])
def test_core_fits_a_byte_tokenizer(chat):
    tokenizer = byte_tokenizer(chat)
    paraphrases = bundled_rows("core", "paraphrases")
    for split in ("edit", "tune", "check"):
        for item in requests("core", split=split):
            texts = [row["text"] for row in paraphrases if item.form in row["forms"]]
            for variant in [item, *map(item.paraphrased, texts)]:
                assert tokenize(tokenizer, variant).subject_spans


@needs_shared
def test_core_copies_no_sentence():
    shared_text = " ".join(
        " ".join(file.read_text("utf-8").lower().split())
        for file in SHARED.rglob("*")
        if file.suffix in (".json", ".jsonl", ".csv")
    )
    rows = [row for table in ("requests", "jailbreaks", "harmless") for row in bundled_rows("core", table)]
    assert not [row["text"] for row in rows if row["text"].lower().rstrip(".?!") in shared_text]


@pytest.mark.parametrize("name", BUNDLED_SETS)
def test_a_datasheet_counts_its_rows(name):
    data = Path(__file__).parents[2] / "lens_defense/data"
    sheet = (data / name / "DATASHEET.md").read_text("utf-8")
    lines = re.findall(r"^\| ([a-z_]+)\.jsonl(?:, (\w+))? \| (\d+)(?:: ([^|]*))? \|", sheet, re.MULTILINE)
    assert {table for table, *_ in lines} >= {
        "requests",
        "paraphrases",
        "jailbreaks",
        "facts",
        "neutral",
        "corpus",
    }
    for table, kind, number, splits in lines:
        rows = [row for row in bundled_rows(name, table) if not kind or row["kind"] == kind]
        assert len(rows) == int(number), (table, kind)
        stated = dict(entry.split() for entry in splits.split(", ")) if splits else {}
        counted = Counter(row["split"] for row in rows) if stated else {}
        assert {split: int(n) for split, n in stated.items()} == counted, (table, kind)


def test_core_has_a_datasheet_and_a_small_corpus():
    data = Path(__file__).parents[2] / "lens_defense/data"
    assert (data / "core/DATASHEET.md").stat().st_size > 500
    assert (data / "core/corpus.jsonl").stat().st_size < 100_000
    assert all(text.user and text.assistant for text in read_corpus())
    corpus_texts = {text.user for text in read_corpus()}
    assert {row["text"] for row in bundled_rows("core", "harmless")} < corpus_texts
    check_texts = {row["text"] for row in bundled_rows("core", "requests") if row["split"] == "check"}
    assert not corpus_texts & check_texts
