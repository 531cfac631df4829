"""A corpus from every source: its texts, and a sentence where there are none."""

import json

import datasets
import pytest

from lens_defense.prompts.corpus import CorpusText, read_corpus


def test_corpora_from_files(tmp_path):
    plain, rows, empty = (tmp_path / name for name in ("a.txt", "b.jsonl", "c.txt"))
    plain.write_text("one\ntext\n\n\n\nanother", "utf-8")
    assert read_corpus(plain) == [CorpusText("one\ntext"), CorpusText("another")]
    pair = {"user": "hi", "assistant": "you\u2028there"}
    lines = [json.dumps(row, ensure_ascii=False) for row in ({"text": "one"}, pair)]
    rows.write_text("\n".join(lines) + "\n", "utf-8")
    assert read_corpus(rows) == [CorpusText("one"), CorpusText("hi", "you\u2028there")]
    empty.write_text("\n\n", "utf-8")
    with pytest.raises(ValueError, match=r"the corpus .*c\.txt' is empty"):
        read_corpus(empty)


def test_a_corpus_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'someone/nothing' is no bundled set"):
        read_corpus("someone/nothing")
    with pytest.raises(ValueError, match="there is no file"):
        read_corpus(tmp_path / "nothing.txt")


def test_so_many_texts_of_a_hub_set_are_streamed(monkeypatch):
    def load_dataset(name, *, split, streaming):
        assert (name, split, streaming) == ("someone/texts", "train", True)
        return datasets.Dataset.from_list([{"text": f"text {i}"} for i in range(5)]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_corpus("someone/texts", rows=2) == [CorpusText("text 0"), CorpusText("text 1")]
