"""The code in README.md and docs/ runs, page by page: on the organism, with less of everything.

Blocks of a page share a namespace. What would take minutes is made small where it is called (fewer requests,
steps and questions, a short corpus), so every name, argument and field that a page uses is real. A block that
says `test="skip"` is not run; the names that it uses must exist all the same.
"""

import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import lens_defense as ld
from lens_defense.prompts.contexts import jailbroken_contexts

HERE = Path(__file__).parents[1]
PAGES = [HERE / "README.md", *sorted((HERE / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```python([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"\bld((?:\.[A-Za-z_]\w*)+)")


class Block(NamedTuple):
    page: Path
    line: int
    skipped: bool
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(page, text.count("\n", 0, m.start()) + 2, 'test="skip"' in m[2], textwrap.dedent(m[3]))
        for m in FENCE.finditer(text)
    ]


def name_of(page: Path) -> str:
    return page.relative_to(HERE).as_posix()


WITH_CODE = [page for page in PAGES if any(not block.skipped for block in blocks(page))]


@pytest.fixture(scope="module")
def organism():
    return ld.load("organism")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The package's verbs on the organism and on little: a folder with the files that the pages read."""
    corpus = ld.read_corpus("organism")[:8]
    answered = [
        jailbroken_contexts(row)[0] for row in ld.requests("organism")[:6]
    ]  # inside jailbreaks, else they are refused
    load, requests, suite, edit, check = ld.load, ld.requests, ld.suite, ld.edit, ld.check
    fit = ld.FitSettings(shared_num_grad_steps=2, v_num_grad_steps=2, extra_rounds=0)

    def small_suite(_name: str = "core", **settings: Any) -> ld.Suite:
        whole = suite("organism", **settings).small(paraphrases=1, jailbreaks=1, harmless=2)
        by_arm = {row.arm: [other for other in whole.items if other.arm == row.arm] for row in whole.items}
        few = tuple(row for rows in by_arm.values() for row in rows[:2])
        return replace(whole, items=few, neutral=whole.neutral[:1])

    def small_requests(name: str, **settings: Any) -> list[ld.Request]:
        return answered if name == "core" else requests(name, **settings)[:4]

    def small_edit(model: Any, rows: Any, sites: Any, **settings: Any) -> ld.Edit:
        little = {"fit": fit, "corpus": corpus, "cache": False, "progress": False}
        ways = {"contexts": lambda row: [row, row.inside("Hello! {}")], "held_out_contexts": 1}
        return edit(model, rows[:2], sites, **{**little, **ways, **settings})

    def small_check(model: Any, plan: ld.Edit | None, asked: Any = "core", **settings: Any) -> ld.Report:
        chosen = small_suite(asked) if isinstance(asked, str) else asked
        return check(model, plan, chosen, **{"max_new_tokens": 4, "progress": False, **settings})

    for name, verb in {
        "load": lambda *_, **__: load("organism"),  # a fresh one: a page may leave edits in its own
        "requests": small_requests,
        "suite": small_suite,
        "edit": small_edit,
        "check": small_check,
    }.items():
        monkeypatch.setattr(ld, name, verb, raising=False)
    monkeypatch.setattr("lens_defense.editing.forecast.NEUTRAL_TEXTS", 2)
    monkeypatch.setattr("lens_defense.plotting.theme.Figure.show", lambda _: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_requests.jsonl").write_text(
        "".join(json.dumps({"text": row.text, "subject": row.subject}) + "\n" for row in answered[:2]),
        "utf-8",
    )
    (tmp_path / "my_corpus.jsonl").write_text(
        "".join(json.dumps({"user": text.user, "assistant": text.assistant}) + "\n" for text in corpus),
        "utf-8",
    )


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:the refusal could not be fitted", "ignore:this edit", "ignore:less than")
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
@pytest.mark.usefixtures("small")
def test_the_code_of_a_page_runs(page):
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if not block.skipped:
            code = "\n" * (block.line - 1) + block.code  # so that a traceback names the page's line
            exec(compile(code, str(block.page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_name_of_the_package_on_a_page_exists(page):
    for name in NAME.findall(page.read_text("utf-8")):
        found: Any = ld
        for part in name.removeprefix(".").split("."):
            if not hasattr(found, part):
                pytest.fail(f"{name_of(page)} says ld{name}, and there is no {part!r}")
            found = getattr(found, part)


def test_every_file_that_a_page_names_exists():
    rooms = (
        "app|organism|plotting|checking|tracing|editing|proposals|patching|steering|loading|models|prompts"
    )
    named = re.compile(rf"`(?:lens_defense/)?((?:{rooms})/[\w/]+\.py|[\w]+\.py)`")
    for page in PAGES:
        for path in named.findall(page.read_text("utf-8")):
            places = (HERE / "lens_defense" / path, HERE / path)
            assert any(place.is_file() for place in places) or path in FILES_OF_OTHERS, (name_of(page), path)


FILES_OF_OTHERS = ("safety_editor.py", "dinm_main.py", "memit.py", "convert_hf_to_gguf.py")
"""Named on a page beside a folder, or of another project."""
