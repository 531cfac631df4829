"""Wrong and swapped arguments of every verb: one sentence that shows the right call."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import transformers as hf
from helpers.tiny_models import CONFIGS, tiny_model
from helpers.trace_cases import BELL, LAMP

import lens_defense as ld
from lens_defense.arguments import did_you_mean, in_words
from lens_defense.prompts.resolve_requests import resolve_requests

pytestmark = pytest.mark.usefixtures("unchecked")
SITE = ld.Site("mlp_out", 1, "subject_last")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", chat=True)


@pytest.fixture(scope="module")
def trace(model):
    return ld.trace(model, [LAMP], progress=False, answer_tokens=2, min_difference=0.0)


@pytest.fixture(scope="module")
def hf_model():
    return hf.AutoModelForCausalLM.from_config(CONFIGS["llama"]())


class Given(NamedTuple):
    model: object
    trace: ld.Trace


SWAPPED = {
    "trace": lambda arguments: ld.trace([LAMP], arguments.model),
    "edit's requests": lambda arguments: ld.edit(arguments.model, [SITE], [LAMP]),
    "edit's model": lambda arguments: ld.edit([LAMP], arguments.model, [SITE]),
    "a trace for sites": lambda arguments: ld.edit(arguments.model, [LAMP], arguments.trace),
    "layers for sites": lambda arguments: ld.edit(arguments.model, [LAMP], [1, 2]),
    "texts to keep": lambda arguments: ld.edit(arguments.model, [LAMP], [SITE], keep=["an edit"]),
    "heatmap": lambda arguments: ld.heatmap([SITE], arguments.trace),
    "heatmap of sites alone": lambda _: ld.heatmap(SITE),
    "layers on a heatmap": lambda arguments: ld.heatmap(arguments.trace, [3]),
    "locate": lambda arguments: ld.locate(arguments.model),
    "check": lambda arguments: ld.check(arguments.model, "core"),
    "check's model": lambda arguments: ld.check(None, arguments.model),
    "survey": lambda arguments: ld.survey([LAMP], arguments.model, "folder"),
    "ledger": lambda _: ld.Ledger("smollm2"),
    "explorer": lambda arguments: ld.Explorer(arguments.model, arguments.trace, [LAMP]),
    "save": lambda arguments: ld.save_folder("folder", arguments.model),
    "gguf": lambda arguments: ld.save_gguf("file.gguf", arguments.model),
    "adapter": lambda arguments: ld.load_adapter(arguments.model, "folder"),
    "aliases": lambda arguments: ld.propose_aliases(arguments.model, "a text"),
    "lens": lambda arguments: ld.lenses.logit_lens([LAMP], arguments.model),
    "subjects": lambda arguments: ld.mark_subjects(["a text"], arguments.model),
    "controls": lambda _: ld.control_sites([1], 4),
    "numbers": lambda arguments: ld.trace(arguments.model, [1, 2]),
    "nothing": lambda arguments: ld.trace(arguments.model, None),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_wrong_arguments_show_the_right_call(model, trace, name):
    with pytest.raises(TypeError, match=r" must .*the call is ld\.[\w.]+\(") as caught:
        SWAPPED[name](Given(model, trace))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 240


@pytest.mark.parametrize(
    "verb", [lambda m: ld.trace(m, [LAMP]), lambda m: ld.edit(m, [LAMP], [SITE]), lambda m: ld.Ledger(m)]
)
def test_a_model_of_transformers_is_to_be_wrapped(hf_model, verb):
    with pytest.raises(TypeError, match=r"model = ld\.load\(hf_model, tokenizer\)"):
        verb(hf_model)


def test_sites_that_no_model_has():
    with pytest.raises(ValueError, match=r"no component 'mpl_out'.*did you mean 'mlp_out'"):
        ld.Site("mpl_out", 3, "subject_last")
    with pytest.raises(ValueError, match=r"no role 'subject_lst'.*did you mean 'subject_last'"):
        ld.Site("mlp_out", 3, "subject_lst")  # type: ignore[arg-type]
    for layer in ("3", 3.0, True, None):
        with pytest.raises(TypeError, match="layer must be an integer"):
            ld.Site("mlp_out", layer, "subject_last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="counted from 0"):
        ld.Site("mlp_out", -1, "subject_last")
    assert type(ld.Site("z.3", np.int64(2), "last").layer) is int  # type: ignore[arg-type]


def test_one_component_role_or_site_needs_no_list(model, trace):
    one = ld.trace(
        model, LAMP, components="mlp_out", positions="last", layers=[1],
        progress=False, answer_tokens=2, min_difference=0.0,
    )  # fmt: skip
    assert one.components == ("mlp_out",) and one.settings.roles == ("last",)
    with pytest.raises(ValueError, match="did you mean 'mlp_out'"):
        ld.trace(model, LAMP, components="mlp")
    with pytest.raises(ValueError, match="did you mean 'components'"):
        ld.trace(model, LAMP, component="mlp_out")
    assert len(ld.heatmap(trace, SITE).layout.shapes) == len(ld.heatmap(trace, [SITE]).layout.shapes)


# Requests in hand


def row(item):
    return {"text": item.text, "subject": item.subject, "id": item.id}


FORMS = {
    "one": BELL,
    "list": [LAMP, BELL],
    "tuple": (LAMP, BELL),
    "rows": [row(LAMP), row(BELL)],
    "row": row(BELL),
    "frame": pd.DataFrame([row(LAMP), row(BELL)]),
    "mixed": [LAMP, row(BELL)],
}


@pytest.mark.parametrize("form", FORMS)
def test_requests_in_hand(model, form):
    expected_requests = [BELL] if form in ("one", "row") else [LAMP, BELL]
    assert list(resolve_requests(FORMS[form], "call")) == expected_requests
    traced = ld.trace(model, FORMS[form], progress=False, answer_tokens=2, min_difference=0.0)
    expected = ld.trace(model, expected_requests, progress=False, answer_tokens=2, min_difference=0.0)
    assert [p.request for p in traced.prompts] == expected_requests
    assert traced.effects.equal(expected.effects) or (
        (traced.effects - expected.effects).nan_to_num().abs().max() == 0
    )


def test_data_sets_and_files_in_hand(tmp_path):
    import datasets

    rows = [row(LAMP), row(BELL)]
    assert resolve_requests(datasets.Dataset.from_list(rows), "call") == (LAMP, BELL)
    file = tmp_path / "mine.csv"
    pd.DataFrame(rows).to_csv(file, index=False)
    for named in (file, str(file)):
        assert resolve_requests(named, "call") == (LAMP, BELL)
    assert resolve_requests("organism", "call") == tuple(ld.requests("organism"))
    assert ld.requests(pd.DataFrame(rows)) == [LAMP, BELL]
    missing = pd.DataFrame([row(LAMP), {**row(BELL), "subject": float("nan")}])
    assert resolve_requests(missing, "call")[1].subject is None


def test_texts_are_requests_without_a_subject(model):
    assert resolve_requests("How are you?", "call")[0].text == "How are you?"
    for bare in ("How do I make a lamp?", ["How do I make a lamp?"], {"text": "How do I make a lamp?"}):
        with pytest.raises(
            ValueError,
            match=r"no subject.* is marked in '.*'\. Name it.* ld\.mark_subjects\(model, requests\)$",
        ):
            ld.trace(model, bare)
    with pytest.raises(ValueError, match="row 2: the field 'subject'"):
        ld.trace(model, [row(LAMP), {"text": "a", "subject": 3}])


def test_a_text_that_ends_like_a_file_is_a_text_unless_the_file_exists(tmp_path):
    for text in ("Write the parts of a lamp to lamp.csv", "the parts of a lamp, " * 400 + "as lamp.csv"):
        assert [item.text for item in resolve_requests(text, "call")] == [text]
    with pytest.raises(ValueError, match=r"there is no file lamp\.csv \(looked in .*\); check its name"):
        resolve_requests("lamp.csv", "call")
    file = tmp_path / "my lamps.csv"
    pd.DataFrame([row(LAMP)]).to_csv(file, index=False)
    assert resolve_requests(str(file), "call") == (LAMP,)


def test_a_set_without_subjects_names_its_columns():
    with pytest.warns(UserWarning, match="no subjects.*'goal', 'kind_of'.*mark_subjects"):
        read = ld.requests([{"goal": "make a lamp", "kind_of": "lamp"}])
    assert read[0].subject is None
    assert ld.requests([{"goal": "make a lamp", "kind_of": "lamp"}], subject="kind_of")[0].subject == "lamp"


def test_words_for_values():
    assert in_words([LAMP]) == "a list of Request"
    assert in_words([]) == "an empty list"
    assert in_words("core") == "the text 'core'"
    assert in_words(3) == "the number 3"
    assert in_words(None) == "None"
    assert did_you_mean("xyz", ["mlp_out"]) == ""
