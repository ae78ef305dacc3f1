"""The HTML page of the report."""

import re
from html.parser import HTMLParser

from pipelines.reports.evidence_page import Origin, Section, page
from pipelines.reports.tables import Table


def test_a_page_refers_to_nothing_outside_itself_and_names_its_origin():
    origin = Origin("run1", ["nested1aa", "nested2bb"], [0, 1], "python -m pipelines ablate --config a&b.yaml")
    table = Table("scores <1>", ["arm", "loss"], [["full & co", "1.0"]], "a note")
    text = page("evidence", [Section("Five choices", ["A <verdict>."], [table], {"waterfall": b"png"}, origin)])
    references = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert references == ["data:image/png;base64,cG5n"]
    assert "http" not in text and "url(" not in text and "<script" not in text
    assert "full &amp; co" in text and "A &lt;verdict&gt;." in text and "scores &lt;1&gt;" in text
    place = text.index("<img")
    below = text[place:]
    assert "<code>run1</code>" in below and "nested1a, nested2b" in below and "Seeds: 0, 1" in below
    assert "python -m pipelines ablate --config a&amp;b.yaml" in below

    class Balanced(HTMLParser):
        depth = 0

        def handle_starttag(self, tag, attrs):
            self.depth += tag not in ("meta", "img")

        def handle_endtag(self, tag):
            self.depth -= 1

    parser = Balanced()
    parser.feed(text)
    assert parser.depth == 0
