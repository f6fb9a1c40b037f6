"""The report in a headless Chromium: parts, phone, paper, script, policy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.studies.pages import Page, chromium, needs_chromium, probe
from tests.studies.sample_result import make_result
from tests.studies.test_report import KINDS, PARTS

from deltatune.studies.report import render, write_report

pytestmark = [pytest.mark.browser, needs_chromium]

PHONE = "--window-size=360,800"
LONG = "lora(r=8,at=attn.{q,k,v,o})|adapter(d=64,at=ffn.{up,down})|prefix(n=16)"


@pytest.fixture(scope="module")
def source() -> str:
    return render(make_result(rows=120))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


def saved(folder: Path, source: str, name: str = "report.html") -> Path:
    path = folder / name
    path.write_text(source, encoding="utf-8")
    return path


def hostile(result: dict[str, Any]) -> dict[str, Any]:
    """Long words without a space where a page breaks most easily."""
    result["sentence"] = result["command"] = "x" * 300
    result["summary"][0]["delta"] = result["chosen"] = LONG
    for run in result["runs"]:
        run["delta"] = LONG if run["delta"].startswith("lora") else run["delta"]
        run["norms"] = {
            f"decoder.{block}.{site}": 1.0 for block in range(32) for site in ("attn.q", "ffn.down", "x" * 60)
        }
    for example in result["examples"]:
        example["input"] = "y" * 400
        example["predictions"] = {LONG: "z" * 80, "adapter(d=64)": example["gold"]}
    return result


def test_the_browser_shows_every_part_as_written(tmp_path: Path) -> None:
    result = make_result(rows=80)
    path = write_report(result, tmp_path / "report.html")
    ours, theirs = Page(path.read_text(encoding="utf-8")), Page(chromium(path, tmp_path, "--dump-dom"))
    for part in PARTS:
        assert theirs.part(part) == ours.part(part)
    # Wrong nesting (a <div> in a <p>) makes a browser add or move elements.
    assert [tag for tag, _ in theirs.elements] == [tag for tag, _ in ours.elements]
    assert theirs.all("html")[0].get("class") == "js", "the policy must let the page's own script run"


@pytest.mark.parametrize("kind", [*KINDS, "many labels", "hostile"])
def test_a_phone_scrolls_down_only(kind: str, folder: Path) -> None:
    if kind in KINDS:
        result = make_result(kind=kind, rows=80)
    else:
        result = make_result(labels=150, rows=300)
    if kind == "hostile":
        result = hostile(result)
    script = """
      for (const more of document.querySelectorAll("details")) more.open = true;
      const wide = [...document.querySelectorAll("body *")].filter(
        (one) => one.getBoundingClientRect().right > innerWidth + 0.5 && !one.closest(".wide") && !one.closest("svg"));
      return {view: innerWidth, page: document.scrollingElement.scrollWidth,
              wide: wide.map((one) => one.outerHTML.slice(0, 80)),
              drawn: [...document.querySelectorAll("svg.drawing text")]
                .filter((one) => one.getClientRects().length && !one.closest("svg").closest(".for-wide"))
                .map((one) => one.getBoundingClientRect().height)};
    """
    found = probe(render(result), folder, script, width=360)
    assert found["view"] == 360
    assert found["page"] == 360
    assert found["wide"] == []
    assert min(found["drawn"]) >= 9, "text of the drawings must be readable on a phone"


def test_a_phone_gets_the_narrow_drawing_and_a_desk_the_wide_one(source: str, folder: Path) -> None:
    script = (
        """return ["wide", "narrow"].map((one) => getComputedStyle(document.querySelector(".for-" + one)).display)"""
    )
    assert probe(source, folder, script, width=360) == ["none", "block"]
    assert probe(source, folder, script) == ["block", "none"]


def test_no_label_of_the_drawing_covers_another(source: str, folder: Path) -> None:
    script = """
      const boxes = [...document.querySelectorAll(".for-%s svg text")]
        .map((one) => [one.textContent, one.getBoundingClientRect()]);
      const hits = [];
      boxes.forEach(([a, x], i) => boxes.slice(i + 1).forEach(([b, y]) => {
        if (x.left < y.right && y.left < x.right && x.top < y.bottom && y.top < x.bottom) hits.push([a, b]);
      }));
      return {hits, texts: boxes.map(([text]) => text)};
    """
    for name, width in (("narrow", 360), ("wide", 1280)):
        found = probe(source, folder, script % name, width=width)
        assert found["hits"] == []
        assert {"full", "head-only", "prompt(n=20)"} <= set(found["texts"])


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_every_text_has_contrast_in_both_schemes(scheme: int, source: str, folder: Path) -> None:
    script = """
      const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
      const pixel = (over, under) => {
        paint.fillStyle = under; paint.fillRect(0, 0, 1, 1); paint.fillStyle = over; paint.fillRect(0, 0, 1, 1);
        return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
      };
      const light = (rgb) => rgb.map((one) => one / 255)
        .map((one) => one <= .03928 ? one / 12.92 : ((one + .055) / 1.055) ** 2.4)
        .reduce((sum, one, i) => sum + one * [.2126, .7152, .0722][i], 0);
      const page = getComputedStyle(document.body).backgroundColor;
      const found = {};
      for (const one of document.querySelectorAll("body *")) {
        if (![...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) continue;
        if (one.closest("script") || !one.getClientRects().length) continue;
        const svg = one.closest("svg");
        let under = one;
        while (under && getComputedStyle(under).backgroundColor === "rgba(0, 0, 0, 0)") under = under.parentElement;
        const ground = `rgb(${pixel(under ? getComputedStyle(under).backgroundColor : page, page).join(",")})`;
        const style = getComputedStyle(one);
        const [a, b] = [light(pixel(svg ? style.fill : style.color, ground)), light(pixel(ground, ground))];
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (ratio < 4.5) found[one.outerHTML.slice(0, 70)] = ratio.toFixed(2);
      }
      return {found, page};
    """
    found = probe(source, folder, script, f"--blink-settings=preferredColorScheme={scheme}")
    assert found["page"] == ("rgb(17, 24, 30)" if scheme == 0 else "rgb(255, 255, 255)")
    assert found["found"] == {}


def test_the_filter_finds_errors_in_the_folded_rows_too(source: str, folder: Path) -> None:
    script = """
      const box = document.getElementById("error-filter"), list = document.getElementById("error-list");
      const shown = () => [...list.querySelectorAll(".case")].filter((one) => one.checkVisibility());
      const all = list.querySelectorAll(".case").length, before = shown().length;
      const last = [...list.querySelectorAll(".case")].at(-1).querySelector(".note span").textContent;
      box.value = last.toUpperCase(); box.dispatchEvent(new Event("input"));
      const during = shown().map((one) => one.querySelector(".note span").textContent);
      const said = list.querySelector("[data-found]").textContent;
      box.value = ""; box.dispatchEvent(new Event("input"));
      return {all, before, last, during, said, after: shown().length};
    """
    found = probe(source, folder, script)
    assert found["before"] == 8 < found["all"]
    assert found["last"] in found["during"] and len(found["during"]) < found["all"]
    assert found["said"] == f"{len(found['during'])} found"
    assert found["after"] == found["all"]


def test_the_command_is_copied_or_else_selected(source: str, folder: Path) -> None:
    script = """
      const texts = [];
      Object.defineProperty(navigator, "clipboard", {value: %s});
      document.querySelector("[data-copy]").click();
      const until = performance.now() + 50; while (performance.now() < until);
      return {texts, button: document.querySelector("[data-copy]").offsetWidth > 0};
    """
    found = probe(source, folder, script % "{writeText: (text) => { texts.push(text); return Promise.resolve(); }}")
    assert found["texts"] == [make_result()["command"]]
    assert found["button"]
    refused = script.replace("return {texts", "return {texts, selected: String(getSelection())") % "undefined"
    assert probe(source, folder, refused)["selected"] == make_result()["command"]


def test_without_javascript_only_copy_and_filter_are_gone(source: str, folder: Path) -> None:
    bare = re.sub(r"<script>.*?</script>", "", source, flags=re.DOTALL)
    script = """
      const seen = (what) => document.querySelector(what).getClientRects().length > 0;
      return ["[data-copy]", ".filter", "#command-text", "#error-list .case", "details summary"].map(seen);
    """
    assert probe(bare, folder, script) == [False, False, True, True, True]


def test_a_script_that_is_not_the_page_s_own_does_not_run(source: str, folder: Path) -> None:
    planted = source.replace(
        "</main>", "</main><script>document.body.id = 'planted'</script><img src=x onerror='document.body.id=1'>"
    )
    assert Page(chromium(saved(folder, planted), folder, "--dump-dom")).all("body")[0].get("id") is None


def pages_printed(source: str, folder: Path) -> int:
    pdf = folder / "report.pdf"
    pdf.unlink(missing_ok=True)
    chromium(saved(folder, source, "print.html"), folder, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    data = pdf.read_bytes()
    assert data.startswith(b"%PDF-")
    return len(re.findall(rb"/Type\s*/Page\b(?!s)", data))


def test_paper_shows_what_is_folded_with_and_without_javascript(source: str, folder: Path) -> None:
    bare = re.sub(r"<script>.*?</script>", "", source, flags=re.DOTALL)
    unfolded = source.replace("<details>", "<details open>")
    pages = pages_printed(unfolded, folder)
    assert pages >= 4
    assert pages_printed(source, folder) == pages
    assert pages_printed(bare, folder) == pages


def test_printing_opens_what_is_folded_and_folds_it_again(source: str, folder: Path) -> None:
    # For browsers whose style sheets cannot open <details>.
    script = """
      const open = () => document.querySelectorAll("details[open]").length, counts = [open()];
      for (const event of ["beforeprint", "afterprint"]) { dispatchEvent(new Event(event)); counts.push(open()); }
      return [...counts, document.querySelectorAll("details").length];
    """
    before, during, after, every = probe(source, folder, script)
    assert before == after < during == every


def test_nothing_is_wider_than_paper(folder: Path) -> None:
    # A4 less its margins is 180 mm: 680 px; the print rules are made to hold for the screen.
    source = render(hostile(make_result(labels=150, rows=120))).replace("@media print", "@media all")
    script = "return [document.scrollingElement.scrollWidth, innerWidth]"
    width, view = probe(source, folder, script, width=680)
    assert width <= view == 680


def test_a_screenshot_of_a_phone_is_not_blank(source: str, folder: Path) -> None:
    from PIL import Image

    picture = folder / "phone.png"
    chromium(saved(folder, source), folder, PHONE, f"--screenshot={picture}")
    with Image.open(picture) as image:
        assert image.size == (360, 800)
        colours = image.convert("RGB").getcolors(maxcolors=1_000_000)
    assert colours is not None and len(colours) > 50
