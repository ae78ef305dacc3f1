"""The page for browsers."""

import re
from html.parser import HTMLParser

from serve.api.page import PAGE


class Collector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.scripts = ""

    def handle_starttag(self, tag, attrs) -> None:
        self.ids |= {value for name, value in attrs if name == "id"}
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "srcset", "data", "poster")]
        if tag not in ("meta", "input", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts += data


def test_the_page_is_served_and_needs_no_other_site(client) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert response.text == PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bimport\b", response.text)
    page = Collector()
    page.feed(response.text)
    assert page.open == []
    assert page.links == []


def test_the_script_uses_existing_elements_and_routes(client) -> None:
    page = Collector()
    page.feed(PAGE.read_text(encoding="utf-8"))
    used = set(re.findall(r'\$\("(\w+)"\)', page.scripts))
    assert used and used <= page.ids
    paths = set(re.findall(r'["`](/v1/[\w/]+)', page.scripts))
    assert paths == {"/v1/models", "/v1/cache", "/v1/completions", "/v1/chat/completions"}
    assert paths <= set(client.get("/openapi.json").json()["paths"])
    report = client.get("/v1/cache").json()
    for name in re.findall(r"\bcache\.([\w.]+)", page.scripts):
        value = report
        for key in [key for key in name.split(".") if key not in ("toLocaleString", "map")]:
            value = value[key]


def test_the_page_is_short() -> None:
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 150
