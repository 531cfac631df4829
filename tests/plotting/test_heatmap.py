"""Figures as data: what stands in which cell, what is outlined, and that text stays text."""

import html
import shutil
import webbrowser
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from helpers.handmade import HOSTILE, a_prompt, a_report, a_request, a_trace, lamp_prompts, sites_at
from plotly.io import renderers

from lens_defense.checking.suites import ARMS
from lens_defense.patching.trace_settings import TraceSettings
from lens_defense.plotting.heatmap import head_heatmap, heatmap, site_cells
from lens_defense.plotting.rate_bars import rate_bars
from lens_defense.plotting.reddest_column import why_not_reddest
from lens_defense.plotting.theme import COLOURS, ROLE_WORDS, save_figure
from lens_defense.prompts.request import Role
from lens_defense.shown_text import visible_text
from lens_defense.sites import Site
from lens_defense.tracing.locate import _ROLES_OF_MANY_TOKENS, _ROLES_WITHIN_SUBJECT, locate
from lens_defense.tracing.map_statistics import significance
from lens_defense.tracing.trace_result import Trace

NO_EXPORT = next(
    (
        f"{name} is missing"
        for name, installed in (
            ("kaleido", find_spec("kaleido")),
            (
                "a Chromium",
                any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
            ),
        )
        if not installed
    ),
    "",
)


def labels(figure: go.Figure, axis: str = "xaxis") -> list[str]:
    return [html.unescape(text) for text in figure.layout[axis].ticktext]


def outlines(figure: go.Figure) -> set[tuple[str, float, float, float, float]]:
    """Panel axis and edges of each outlined block, rounded to the cells' edges."""
    return {
        (s.xref, round(s.x0 - 0.05, 1), round(s.x1 + 0.05, 1), round(s.y0 - 0.05, 2), round(s.y1 + 0.05, 2))
        for s in figure.layout.shapes
        if s.name == "site"
    }


def brackets(figure: go.Figure) -> set[tuple[float, float]]:
    spans = {(s.x0, s.x1) for s in figure.layout.shapes if s.name == "subject" and s.x0 != s.x1}
    return {(round(a + 0.42), round(b - 0.42)) for a, b in spans}


def note(figure: go.Figure) -> str:
    """What stands at the foot of a figure."""
    return " ".join(n.text for n in figure.layout.annotations if n.name == "note").replace("<br>", " ")


def gaps(figure: go.Figure) -> list[str]:
    """What the hovers of columns of left-out tokens say."""
    return [n.hovertext for n in figure.layout.annotations if n.name == "gap"]


def texts(figure: go.Figure) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def test_one_request_has_layers_times_tokens_a_panel_a_component():
    trace = a_trace(components=("resid_post", "mlp_out", "attn_out"))
    figure = heatmap(trace)
    assert len(figure.data) == 3
    for c, panel in enumerate(figure.data):
        np.testing.assert_array_equal(panel.z, trace.effects[0, c].numpy())
    assert labels(figure) == ["‹im_start›", "user", "↵", "make", "·a", "·pipe", "·bomb", "?", "‹im_end›", "↵"]  # noqa: RUF001
    assert list(figure.layout.xaxis.tickvals) == list(range(10)) == list(figure.data[0].x)


def test_scale_is_symmetric_about_zero_and_shared():
    trace = a_trace(components=("resid_post", "mlp_out"))
    most = trace.effects.abs().max().item()
    figure = heatmap(trace)
    for panel in figure.data:
        assert (panel.zmid, panel.zmin, panel.zmax) == (0, -most, most)
    assert [panel.showscale for panel in figure.data] == [False, True]


def test_only_traced_tokens_and_the_subject_are_shown_and_gaps_are_marked():
    words = ["<s>", *(f" w{i}" for i in range(40)), " rob", "ot", "ics", "?", " now", "."]
    prompt = a_prompt(words, subject=(41, 44), template=())
    trace = a_trace([prompt], roles=("subject_last", "next", "last"))
    figure = heatmap(trace)
    assert labels(figure) == ["⋯", "·rob", "ot", "ics", "?", "⋯", "."]
    assert [s.x0 for s in figure.layout.shapes if s.name == "gap"] == [-0.5, 4.5]
    z = figure.data[0].z
    assert np.isnan(z[:, [0, 1, 2, 5]]).all()
    np.testing.assert_array_equal(z[:, [3, 4, 6]], trace.effects[0, 0][:, [43, 44, 46]].numpy())
    assert brackets(figure) == {(1, 3)}
    assert gaps(figure) == ["41 tokens, not traced", "1 token, not traced"]
    assert "Grey: not traced." in note(figure)
    struck = [s.path for s in figure.layout.shapes if s.name == "untraced"]
    assert struck == ["M0.5,-0.5L1.5,3.5M1.5,-0.5L2.5,3.5"], "two subject tokens, and no gap"


def test_many_requests_have_layers_times_roles_in_reading_order():
    trace = a_trace(
        [a_prompt(), a_prompt(subject=(4, 6), request=a_request("a thief", "thief"))],
        roles=("last", "subject_last", "subject_first"),
        layers=(0, 3, 6),
    )
    figure = heatmap(trace)
    words = [ROLE_WORDS[role] for role in ("subject_first", "subject_last", "last")]
    assert [text.replace("<br>", " ") for text in labels(figure)] == words
    means = trace.by_role().set_index(["role", "layer"])["effect"]
    for i, role in enumerate(("subject_first", "subject_last", "last")):
        np.testing.assert_allclose(figure.data[0].z[:, i], [means[role, layer] for layer in (0, 3, 6)])
    assert brackets(figure) == {(0, 1)}
    assert "subject" in texts(figure)
    assert "2 requests" in figure.data[0].hovertext[0, 0]
    assert "mean over 2 requests" in figure.layout.title.text.replace("<br>", " ")


def test_low_layers_are_at_the_bottom_and_named_though_strided():
    figure = heatmap(a_trace(layers=(0, 3, 6, 9)))
    assert list(figure.data[0].y) == [0, 1, 2, 3]
    assert labels(figure, "yaxis") == ["0", "3", "6", "9"]
    assert tuple(figure.layout.yaxis.range) == (-0.5, 3.5)


def test_hover_tells_token_position_layer_role_effect_and_range():
    trace = a_trace(layers=(0, 5))
    row = trace.to_dataframe().query("position == 6 and layer == 5").iloc[0]
    hover = heatmap(trace).data[0].hovertext[1, 6]
    for part in ("·bomb", "position 6", "layer 5", "last subject token", f"{row.effect:.3f}"):
        assert part in hover
    assert f"range {row.low:.3f} to {row.high:.3f}, 2 samples" in hover
    assert "95% interval" in heatmap(a_trace(samples=8)).data[0].hovertext[0, 0]
    assert "range" not in heatmap(a_trace(samples=1)).data[0].hovertext[0, 0]


def test_sites_are_outlined_in_their_panel_at_their_role():
    trace = a_trace(components=("resid_post", "mlp_out"))
    assert outlines(heatmap(trace, sites_at((1, 2)))) == {("x", 5.5, 6.5, 0.5, 2.5)}
    assert outlines(heatmap(trace, sites_at((0, 3), component="mlp_out", role="next"))) == {
        ("x2", 6.5, 7.5, -0.5, 0.5),
        ("x2", 6.5, 7.5, 2.5, 3.5),
    }
    assert outlines(heatmap(trace, [Site("attn_out", 1, "last")])) == set()
    requests = a_trace([a_prompt(), a_prompt()], roles=("subject_first", "subject_last"))
    assert outlines(heatmap(requests, sites_at((1, 2)))) == {("x", 0.5, 1.5, 0.5, 2.5)}


def test_a_role_of_many_tokens_is_outlined_block_by_block():
    figure = heatmap(a_trace(), [Site("resid_post", 0, "template")])
    assert outlines(figure) == {("x", -0.5, 2.5, -0.5, 0.5), ("x", 7.5, 8.5, -0.5, 0.5)}


def test_a_layer_that_was_not_traced_is_outlined_between_its_neighbours():
    trace = a_trace(layers=(0, 3, 6, 9))
    assert outlines(heatmap(trace, sites_at((4,)))) == {("x", 5.5, 6.5, 1.17, 1.5)}
    assert outlines(heatmap(trace, sites_at(range(4, 9)))) == {("x", 5.5, 6.5, 1.17, 2.83)}
    assert outlines(heatmap(trace, sites_at((6,)))) == {("x", 5.5, 6.5, 1.5, 2.5)}
    assert outlines(heatmap(trace, sites_at((10,)))) == {("x", 5.5, 6.5, 3.17, 3.5)}


def test_every_occurrence_of_the_subject_is_bracketed_with_its_text():
    prompt = replace(a_prompt(), subject_spans=((3, 5), (5, 7)))
    figure = heatmap(a_trace([prompt]))
    assert brackets(figure) == {(3, 4), (5, 6)}
    assert texts(figure).count("pipe bomb") == 2


def test_repeated_long_and_special_tokens_stay_apart_and_readable():
    words = [" a", " a", "a" * 50, "<|reserved_special_token_7|>", "<bos>", "\n\n", "", "<b>", "."]
    figure = heatmap(a_trace([a_prompt(words, subject=(0, 1), template=(4,))]))
    assert len(set(figure.data[0].x)) == len(words)
    assert labels(figure) == ["·a", "·a", "a" * 11 + "…", "‹reserve…›", "‹bos›", "↵↵", "∅", "<b>", "."]  # noqa: RUF001


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_escaped_wherever_a_figure_shows_it(text: str):
    hostile_request = a_request(f"make {text} now", text)
    words = ["make", f" {text}", " now", text]
    trace = a_trace([a_prompt(words, subject=(1, 2), request=hostile_request)], answers=[text], model=text)
    figure = heatmap(trace, sites_at())
    shown = [
        *figure.layout.xaxis.ticktext,
        figure.layout.title.text,
        *figure.data[0].hovertext.ravel(),
        *texts(figure),
    ]
    for part in shown:
        bare = part.replace("<br>", "").replace("<b>", "").replace("</b>", "")
        assert not set(bare) & set('<>$\x00\x1b\x07\u202e')  # fmt: skip
    assert text.isprintable() or "\N{REPLACEMENT CHARACTER}" in shown[1]
    name = rate_bars({text: a_report()}).data[1].name
    assert html.unescape(name) == visible_text(text)


def test_visible_gives_a_shape_to_what_has_none():
    assert visible_text("a\tb\n") == "a⇥b↵"
    assert visible_text("\x00\x9f\ud800\u2028\u202e\u200b") == "\N{REPLACEMENT CHARACTER}" * 6
    assert visible_text("né ß 日本 👍\u200d✓") == "né ß 日本 👍\u200d✓"


def test_a_map_without_any_effect_is_drawn():
    trace = a_trace()
    flat = replace(trace, patched=trace.corrupted[:, None, None, None].expand_as(trace.patched))
    assert heatmap(flat).data[0].zmax == 1


def test_bars_are_the_rates_and_their_errors_the_intervals():
    edited, control = a_report(), a_report({"edited": (0, 1), "benign": (0, 0), "facts": (6, 2)})
    figure = rate_bars({"edited": edited, "control": control})
    rates = edited.rates().set_index(["arm", "measure"])
    for bar, when in zip(figure.data, ("before", "after"), strict=False):
        for i, arm in enumerate(
            ("edited", "paraphrase", "jailbreak", "held_out", "benign", "over_refusal", "facts")
        ):
            row = rates.loc[arm, "knows" if arm == "facts" else "coherent"]
            assert bar.y[i] == row[when]
            assert bar.y[i] + bar.error_y.array[i] == pytest.approx(row[f"{when} high"])
            assert bar.y[i] - bar.error_y.arrayminus[i] == pytest.approx(row[f"{when} low"])
    names = [bar.name for bar in figure.data]
    assert names == ["before", "edited", "before (control)", "control"]
    assert [list(bar.x) for bar in figure.data[2:]] == [[0, 4, 6]] * 2
    assert [bar.marker.color for bar in figure.data][1::2] == list(COLOURS[:2])
    assert figure.layout.yaxis.tickformat == ".0%"


def test_harmless_questions_are_drawn_by_the_judge_that_is_harder_on_the_edit():
    report = a_report({"edited": (0, 8), "same_subject": (0, 4)})
    rows = [
        replace(row, verdicts_after={"prefix": "refusal", "coherent": "answer"})
        if row.arm == "same_subject"
        else row
        for row in report.rows
    ]
    after = rate_bars({"edited": replace(report, rows=tuple(rows))}).data[1]
    assert list(after.y) == [1.0, 1.0], "refused by prefix, and by no means coherently"


@pytest.mark.parametrize("arms", [7, 15])
def test_bars_of_many_arms_stay_on_a_page(arms):
    figure = rate_bars({"edited": a_report(dict.fromkeys(ARMS[:arms], (0, 8)))})
    assert figure.layout.width < 1100


def test_bars_show_before_once_where_reports_agree_and_alone_without_an_edit():
    assert [bar.name for bar in rate_bars({"a": a_report(), "b": a_report()}).data] == ["before", "a", "b"]
    assert [bar.name for bar in rate_bars({"as it is": a_report(edited=False)}).data] == ["before"]
    with pytest.raises(ValueError, match="no report"):
        rate_bars({})
    with pytest.raises(ValueError, match="prefix, coherent, got 'knows'"):
        rate_bars({"a": a_report()}, measure="knows")


def test_figures_use_no_template_and_leave_plotly_as_it_was():
    assert not heatmap(a_trace()).layout.template.layout.to_plotly_json()
    assert not rate_bars({"a": a_report()}).layout.template.layout.to_plotly_json()


class Loads(HTMLParser):
    """Collects what a page would load, and its text outside scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "data")]


def test_html_is_self_contained_and_hostile_text_cannot_leave_its_script(tmp_path: Path):
    harmless, hostile = "x", "</script><script>alert(1)</script>"
    parsed = {}
    for text in (harmless, hostile):
        words = ["make", f" {text}", " now", "."]
        trace = a_trace([a_prompt(words, subject=(1, 2), request=a_request(f"make {text}", text))])
        path = save_figure(heatmap(trace), tmp_path / "map.html")
        assert path == tmp_path / "map.html"
        parsed[text] = Loads()
        parsed[text].feed(path.read_text("utf-8"))
        assert parsed[text].loads == []
        assert "<script>alert" not in path.read_text("utf-8")
    assert parsed[harmless].scripts == parsed[hostile].scripts
    assert [file.name for file in tmp_path.iterdir()] == ["map.html"]


def test_html_can_share_one_plotly(tmp_path: Path):
    save_figure(heatmap(a_trace()), tmp_path / "map.html", plotlyjs="directory")
    assert (tmp_path / "map.html").stat().st_size < 100_000
    assert (tmp_path / "plotly.min.js").exists()


def test_another_suffix_is_refused(tmp_path: Path):
    for name in ("map.jpeg", "map.v2"):
        with pytest.raises(ValueError, match=rf"\.html, \.svg, \.pdf or \.png, .*; got '{name}'"):
            save_figure(heatmap(a_trace()), tmp_path / name)


def test_without_kaleido_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lens_defense.plotting.theme.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"figures\]'\) and a Chromium .*; \.html needs neither"):
        save_figure(heatmap(a_trace()), tmp_path / "map.svg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not find_spec("kaleido"), reason="kaleido is missing")
def test_without_a_chromium_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("choreographer.browsers.chromium.Chromium.find_browser", lambda **_: None)
    with pytest.raises(ValueError, match="apt-get install chromium"):
        save_figure(heatmap(a_trace()), tmp_path / "map.svg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(bool(NO_EXPORT), reason=NO_EXPORT or "static export works")
@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<svg"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
def test_static_export(tmp_path: Path, suffix: str, start: bytes):
    path = save_figure(heatmap(a_trace(), sites_at()), tmp_path / f"map.{suffix}")
    assert path.read_bytes().startswith(start)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_significant_means_are_outlined():
    prompts = lamp_prompts(12)
    trace = a_trace(prompts, roles=["subject_last", "last"], samples=1)
    position = prompts[0].positions("subject_last")[0]
    trace.patched[:, 0, :, position] = (
        torch.randn(trace.patched[:, 0, :, position].shape, dtype=torch.float64) * 0.2 - 1
    )
    trace.patched[:, 0, 2, position] = torch.rand(12, 1, dtype=torch.float64) * 0.1 - 0.3
    table = significance(trace)
    significant_cells = {("subject_last", "last").index(row.role) * 100 + row.layer
            for row in table.itertuples() if row.q < 0.05}  # fmt: skip
    boxes = [shape for shape in heatmap(trace, significant=0.05).layout.shapes if shape.name == "significant"]
    inside = {
        column * 100 + layer
        for column in range(2)
        for layer in range(4)
        if any(box.x0 < column < box.x1 and box.y0 < layer < box.y1 for box in boxes)
    }
    assert 2 in significant_cells and inside == significant_cells
    assert "Thin lines: q &lt; 0.05." in note(heatmap(trace, significant=0.05))
    assert all(panel.type == "heatmap" for panel in heatmap(trace).data)


def test_single_heads_are_layers_by_heads():
    prompts = [a_prompt() for _ in range(3)]
    trace = a_trace(prompts, components=["z.0", "z.1", "z.5"], roles=["subject_last"])
    drawn = head_heatmap(trace).data[0]
    means = {(m.component, m.layer): m.effect for m in trace.role_means()}
    assert drawn.z.shape == (4, 3)
    for c, name in enumerate(trace.components):
        for layer in range(4):
            assert drawn.z[layer, c] == pytest.approx(means[name, layer])
            assert name in drawn.hovertext[layer, c]
    assert "at the last subject token" in " ".join(head_heatmap(trace).layout.title.text.split("<br>"))
    together = replace(
        a_trace(lamp_prompts(3), components=["z.0"], roles=["last"]), settings=TraceSettings(together=True)
    )
    whole = head_heatmap(together)
    assert "all tokens together" in " ".join(whole.layout.title.text.split("<br>"))
    assert whole.data[0].z.shape == (4, 1)
    with pytest.raises(ValueError, match="no heads at last"):
        head_heatmap(trace, "last")


@pytest.mark.parametrize("direction, words", [("denoising", "restored"), ("noising", "lost")])
def test_the_scale_says_which_way_it_was_patched(direction, words):
    settings = TraceSettings(direction=direction, severed="mlp_out", exact=False)
    trace = replace(a_trace(), settings=settings)
    figure = heatmap(trace)
    assert words in figure.data[0].colorbar.title.text
    title = figure.layout.title.text.replace("<br>", " ")
    assert "later MLP outputs severed" in title and "estimated by attribution patching" in title


def test_sites_of_another_component_are_not_said_to_be_outlined():
    trace = a_trace(components=("resid_post", "mlp_out"))
    site = Site("resid_post", trace.layers[0], "subject_last")
    assert "Outlined" in note(heatmap(trace, [site]))
    assert "Outlined" not in note(heatmap(trace.only("mlp_out"), [site]))


@pytest.fixture
def plotly_shows(monkeypatch: pytest.MonkeyPatch) -> list[go.Figure]:
    """The figures that Plotly itself is asked to show, on a machine without a notebook."""
    shown: list[go.Figure] = []
    monkeypatch.setattr(go.Figure, "show", lambda figure, *_, **__: shown.append(figure))
    monkeypatch.setattr(renderers, "default", "browser")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("webbrowser.get", lambda: "a browser")
    return shown


def test_without_a_display_show_says_how_to_save(plotly_shows: list[go.Figure]):
    for figure in (heatmap(a_trace()), rate_bars({"a": a_report()})):
        with pytest.warns(UserWarning, match=r"no browser here .*ld\.save_figure\(figure, 'figure\.html'\)"):
            figure.show()
    assert not plotly_shows


def test_without_a_browser_show_says_how_to_save(
    plotly_shows: list[go.Figure], monkeypatch: pytest.MonkeyPatch
):
    def no_browser():
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("webbrowser.get", no_browser)
    with pytest.warns(UserWarning, match="no browser here"):
        heatmap(a_trace()).show()
    assert not plotly_shows


@pytest.mark.parametrize("place", ["a display", "a notebook", "a renderer of one's own"])
def test_where_a_figure_can_be_shown_it_is(
    plotly_shows: list[go.Figure], monkeypatch: pytest.MonkeyPatch, place: str
):
    if place == "a display":
        monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    elif place == "a notebook":
        monkeypatch.setattr(renderers, "default", "plotly_mimetype+notebook")
    figure = heatmap(a_trace())
    figure.show(**({"renderer": "json"} if place == "a renderer of one's own" else {}))
    assert plotly_shows == [figure]


@pytest.mark.skipif(bool(NO_EXPORT), reason=NO_EXPORT or "static export works")
def test_a_chromium_that_does_not_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_start(*_, **__):
        raise RuntimeError("the browser\nclosed")

    monkeypatch.setattr(go.Figure, "to_image", no_start)
    with pytest.raises(
        ValueError, match=r"could not draw the figure as \.svg \(the browser closed\); \.html"
    ):
        save_figure(heatmap(a_trace()), tmp_path / "map.svg")
    assert list(tmp_path.iterdir()) == []


def causal(trace: Trace, *, zero: float = 0.0) -> Trace:
    """The trace with so small an effect before the subject: nothing there depends on it."""
    patched = trace.patched.clone()
    patched[:, :, :, : min(trace.prompts[0].subject_positions)] = zero - 1
    return replace(trace, patched=patched)


def test_tokens_before_the_subject_are_folded_and_counted():
    trace = causal(a_trace(components=("resid_post", "mlp_out")), zero=1e-5)
    figure = heatmap(trace)
    assert labels(figure) == ["⋯", "·pipe", "·bomb", "?", "‹im_end›", "↵"]  # noqa: RUF001
    assert gaps(figure) == ["5 tokens before the subject, without effect"] * 2, "one in each panel"
    np.testing.assert_array_equal(figure.data[1].z[:, 1:], trace.effects[0, 1][:, 5:].numpy())
    assert outlines(heatmap(trace, sites_at((1, 2)))) == {("x", 1.5, 2.5, 0.5, 2.5)}
    unfolded = heatmap(trace, fold=False)
    assert len(labels(unfolded)) == 10 and not gaps(unfolded)
    columns, _, sites = site_cells(trace)[0]
    assert {labels(figure)[column] for column in columns} == {*labels(figure)} - {"⋯"}
    assert {site.role for site in sites} == {"subject_first", "subject_last", "next", "template", "last"}


def test_a_token_before_the_subject_that_has_an_effect_is_shown():
    trace = causal(a_trace())
    trace.patched[0, 0, 2, 1] = -0.9
    assert labels(heatmap(trace)) == ["‹im_start›", "user", "⋯", *labels(heatmap(trace, fold=False))[5:]]  # noqa: RUF001


def spans(figure: go.Figure, axis: str) -> list[tuple[float, ...]]:
    """The domains of all panels, rounded."""
    panels = [figure.layout[f"{axis}axis{c or ''}"] for c in ["", *range(2, len(figure.data) + 1)]]
    return [tuple(round(edge, 2) for edge in panel.domain) for panel in panels]


def test_panels_wrap_where_they_do_not_fit():
    trace = a_trace(components=("resid_post", "mlp_out", "attn_out"))
    page, column = heatmap(trace), heatmap(trace, width="column")
    assert 700 < page.layout.width <= 790 and 300 < column.layout.width <= 380
    assert spans(page, "y") == [(0, 1)] * 3 and len(set(spans(page, "x"))) == 3
    assert spans(column, "x") == [(0, 1)] * 3
    bottoms = [low for low, _ in spans(column, "y")]
    assert bottoms == sorted(bottoms, reverse=True) and len(set(bottoms)) == 3
    shown = [column.layout[axis].showticklabels for axis in ("xaxis", "xaxis2", "xaxis3")]
    assert shown == [False, False, True], "labels stand below the lowest panel"


def test_a_long_prompt_has_labels_that_can_be_read():
    words = [f" w{i}" for i in range(150)]
    figure = heatmap(a_trace([a_prompt(words, subject=(0, 1), template=())]), width="column")
    assert figure.layout.width <= 380
    cell = 246 / 150
    ticks = figure.layout.xaxis.tickvals
    assert (ticks[1] - ticks[0]) * cell >= figure.layout.xaxis.tickfont.size >= 13 * 6 / 8


def test_each_panel_can_have_a_scale_of_its_own():
    trace = a_trace(components=("resid_post", "mlp_out"))
    trace.patched[:, 1] = (trace.patched[:, 1] + 1) / 10 - 1
    figure = heatmap(trace, scale="panel")
    assert [panel.zmax for panel in figure.data] == [trace.effects[:, c].abs().max().item() for c in (0, 1)]
    assert all(panel.showscale for panel in figure.data)


def test_what_is_clearly_negative_has_a_minus():
    trace = a_trace()
    trace.patched[:] = -1 + torch.tensor([1.0, -0.05, -0.2, -0.9], dtype=torch.float64)[:, None, None]
    paths = {s.line.color: s.path for s in heatmap(trace).layout.shapes if s.name == "negative"}
    rows = {
        colour: {float(line.split(",")[-1]) for line in path.split("M")[1:]} for colour, path in paths.items()
    }
    assert rows == {"#1a1a1a": {2.0}, "#ffffff": {3.0}}, "white where the cell is dark, none where it is pale"


def test_before_after_and_difference_stand_side_by_side_on_one_scale():
    before = a_trace(lamp_prompts(2), components=("resid_post", "mlp_out"))
    after = replace(before, patched=(before.patched + 1) / 4 - 1)
    figure = heatmap(before, sites_at((1, 2)), after=after)
    names = ["before", "after", "after − before"]  # noqa: RUF001
    assert texts(figure)[::2][:3] == [f"<b>residual stream, {name}</b>" for name in names]
    plain = [heatmap(before).data[0].z, heatmap(after).data[0].z]
    for panel, z in zip(figure.data, [*plain, plain[1] - plain[0]], strict=False):
        np.testing.assert_allclose(panel.z, z)
    assert len(figure.data) == 6 and len({panel.zmax for panel in figure.data}) == 1
    assert {s.xref for s in figure.layout.shapes if s.name == "site"} == {"x", "x2", "x3"}
    with pytest.raises(ValueError, match="other prompts or answers"):
        heatmap(before, after=a_trace())


WRONG: Mapping[str, tuple[dict[str, Any], str]] = {
    "width": ({"width": "wide"}, r'"column" \(3.25 in\), "page" \(6.75 in\) or a number of inches, got'),
    "scale": ({"scale": "own"}, "scale must be one of shared, panel, got 'own'"),
    "after": ({"after": [a_trace()]}, "after must be a Trace or a ScoreMap"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_one_sentence(name: str):
    settings, sentence = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=sentence):
        heatmap(a_trace(), **settings)


@pytest.mark.parametrize("role", ["subject_first", "next", "last"])
def test_a_note_says_why_the_sites_are_not_the_reddest_column(role: Role):
    trace = a_trace(lamp_prompts(3), roles=["subject_first", "subject_last", "next", "last"])
    trace.patched[:] = (trace.patched + 1) / 10 - 1
    for redder, layers in (("subject_last", slice(0, 4)), (role, slice(3, 4))):
        position = trace.prompts[0].positions(redder)[0]
        trace.patched[:, :, layers, position] = -0.4 if redder == "subject_last" else -0.1
    sites = locate(trace, k=2)
    assert {site.role for site in sites} == {"subject_last"}
    assert f"The reddest column, “{ROLE_WORDS[role]}”, is no site: " in note(heatmap(trace, sites))
    assert "reddest" not in note(heatmap(trace)), "no site, nothing to explain"
    assert "reddest" not in note(heatmap(trace, [Site("resid_post", 3, role)])), "the site is the reddest"


def test_a_role_that_locate_never_names_has_a_reason():
    for role in (*_ROLES_OF_MANY_TOKENS, *_ROLES_WITHIN_SUBJECT):
        assert why_not_reddest(np.array([[0.1, 0.9]]), ["subject_last", role], sites_at())
    assert not why_not_reddest(np.array([[0.1, 0.9]]), ["next", "subject_last"], sites_at(role="next"))
