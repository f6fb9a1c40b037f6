"""Reading a report in tests: a strict HTML parser and a headless Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no `chromium` on PATH (Debian package chromium)")


class Page(HTMLParser):
    """A parsed page: every element with its attributes and text; raises on a tag that closes nothing or stays open."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self.text = ""
        self._open: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        assert len(attributes) == len(attrs), f"an attribute twice in <{tag}>: {attrs}"
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append((tag, attributes.get("id", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-3:]}"
        if tag in ("td", "th", "dt", "dd", "div", "p", "li", "button"):
            self.handle_data(" ")
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] in ("style", "script"):
            return
        self.text += data
        for _, name in self._open:
            if name:
                self.texts[name] = self.texts.get(name, "") + data

    def part(self, name: str) -> str:
        """The text inside the element with this id, spaces made single."""
        return " ".join(self.texts[name].split())

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every element with this tag."""
        return [attributes for found, attributes in self.elements if found == tag]


def chromium(page: Path, folder: Path, *flags: str) -> str:
    """Run a fresh Chromium on a file and return what it prints."""
    assert CHROMIUM
    profile = folder / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout


def probe(source: str, folder: Path, script: str, *flags: str, width: int = 1280) -> Any:
    """Return what the body of a function `script` returns in a copy of the page, `width` pixels wide, that lets it run.

    The copy stands in a frame: a headless window is never narrower than 500 pixels.
    """
    runs = (
        f"<script>addEventListener('load', () => parent.postMessage(JSON.stringify((() => {{ {script} }})()), '*'));"
        "</script></body>"
    )
    copy = folder / "probe.html"
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    assert without_policy != source
    copy.write_text(without_policy.replace("</body>", runs), encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(
        "<!doctype html><body style='margin:0'><script>"
        "addEventListener('message', (message) => { document.body.dataset.probe = message.data; });</script>"
        f"<iframe src='probe.html' style='border:0;width:{width}px;height:900px'></iframe></body>",
        encoding="utf-8",
    )
    found = re.search(r'data-probe="([^"]*)"', chromium(frame, folder, *flags, "--dump-dom"))
    assert found, "the injected script did not run"
    return json.loads(html.unescape(found[1]))
