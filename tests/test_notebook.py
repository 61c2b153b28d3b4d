from __future__ import annotations

import base64
import re
import sys
from html.parser import HTMLParser

from autobatch.report import Device
from report_examples import GIB, example, with_noise


class Page(HTMLParser):
    """Words and tags of a page, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("autobatch._report.figure")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_html_has_the_words_of_the_text(monkeypatch):
    without_matplotlib(monkeypatch)
    report = with_noise()
    page = Page(report._repr_html_())

    shown = "".join("".join(page.words).split())
    words = [word for word in re.findall(r"[\w.×,]{3,}", str(report)) if word != "and"]

    assert page.open == []
    assert [word for word in words if word not in shown] == []
    assert set(page.tags) == {"pre", "span"}


def test_html_includes_the_figure_if_matplotlib_is_installed():
    html = example()._repr_html_()

    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', html)

    assert base64.b64decode(data).startswith(b"\x89PNG")


def test_html_without_matplotlib_has_the_text(monkeypatch):
    without_matplotlib(monkeypatch)

    html = example()._repr_html_()

    assert "<img" not in html
    assert "Micro-batch 32" in html


def test_html_has_no_colours_of_its_own(monkeypatch):
    without_matplotlib(monkeypatch)
    html = example()._repr_html_()

    assert set(re.findall(r"background[\w-]*:(\w+)", html)) == {"none"}
    assert not re.search(r"(?<!-)\bcolor:|#[0-9a-f]{3}|rgb|class=", html)


def test_names_are_text_and_never_markup(monkeypatch):
    without_matplotlib(monkeypatch)
    hostile = '<script>alert("x")</script>\x1b[31m & "more"'
    report = example(
        subject=hostile,
        notes=(hostile,),
        device=Device(name=hostile, source="NVML", total=GIB, foreign=0),
    )

    html = report._repr_html_()
    page = Page(html)

    assert "script" not in page.tags
    assert "\x1b" not in html
    assert "".join(page.words).count('<script>alert("x")</script>') == 3


def test_the_chosen_row_is_marked(monkeypatch):
    without_matplotlib(monkeypatch)

    bold = re.findall(r"<span[^>]*font-weight: bold[^>]*>(.*?)</span>", example()._repr_html_())

    rows = [text for text in bold if "▶" in text]
    assert [row.split()[1] for row in rows] == ["32", "256"]
