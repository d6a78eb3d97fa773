"""encore/report/plots_page.py: the frame of the curves' page opens without a network and obeys nothing in it."""

import base64
import hashlib
import re
from pathlib import Path

import pytest
import vl_convert
from dvc_render import ImageRenderer, VegaRenderer
from dvc_render.html import HTML, render_html

from encore.report import plots_page, vega
from tests.browser import chromium_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("root"))
        plots_page.main()
        return Path(".dvc/plots_template.html").read_text(encoding="utf-8")


def split_page(page: str) -> tuple[str, list[str], str]:
    """What stands before the scripts, the scripts, and what stands behind them."""
    before, *scripts = page.split("<script>")
    pieces = [script.split("</script>") for script in scripts]
    return before, [script for script, _ in pieces], pieces[-1][1]


def test_dvc_finds_its_places_and_brings_in_nothing_else(page: str) -> None:
    """DVC fills a template by replacing text, the library's too; its own scripts come from the network."""
    network = '<script src="https://cdn.example/vega.js"></script>'
    filled = HTML(page, refresh_seconds=7).with_scripts(network).with_element("<div>the curves</div>").embed()
    refresh = '<meta http-equiv="refresh" content="7">'
    assert filled == page.replace("{refresh_tag}", refresh, 1).replace("{plot_divs}", "<div>the curves</div>", 1)
    assert refresh in filled.split("<script>")[0]
    assert filled.endswith("<main></main>\n<plaintext>\n<div>the curves</div>\n")


def test_the_plotting_library_is_inside_and_nothing_is_loaded(page: str) -> None:
    before, (library, _), after = split_page(page)
    for tag in ("src=", "href=", "<link", "url(", "@import", "http:", "https:"):
        assert tag not in before + after
    assert not re.search(r"<script[^>]+src\s*=\s*[\"']?https?:", library)
    assert "vegaEmbed" in library


def test_the_policy_knows_the_two_scripts_and_no_other(page: str) -> None:
    before, scripts, _ = split_page(page)
    policy = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', before)[0]
    sources = dict(entry.strip().split(" ", 1) for entry in policy.split(";"))
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert sources["default-src"] == "'none'"
    assert sources["script-src"].split() == [*(f"'sha256-{digest}'" for digest in hashes), "'unsafe-eval'"]


def test_the_bundle_is_whole_and_ends_where_its_tag_ends(page: str) -> None:
    """A closing tag within the script would end it: the browser looks for nothing else."""
    assert page.count("</script") == 2
    _, (library, _), _ = split_page(page)
    bundle = vl_convert.javascript_bundle(vega.SNIPPET)
    assert len(bundle) > 500_000
    assert library.replace(r"<\/script", "</script") == bundle.replace(r"<\/script", "</script")


def test_a_closing_tag_in_the_library_does_not_close_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda snippet: "let tag = '</script>'; let share = '50%';")
    assert "<script>let tag = '<\\/script>'; let share = '50%';</script>" in plots_page.make_template()


EVIL = "document.title='obeyed'"
NAMES = [
    "main",
    f"</script><script>{EVIL}</script>",
    f'"}};{EVIL};//',
    f"<img/src=x/onerror={EVIL}>",
    "<meta http-equiv=refresh content='0;url=data:text/html,obeyed'>",
    f"</plaintext></main>--></textarea><script>{EVIL}</script>",
    "{plot_divs}{scripts}",
    "var spec = 1;\n vegaEmbed('#x', spec);",
]


def test_names_of_branches_are_drawn_and_not_obeyed(page: str, tmp_path: Path) -> None:
    """As DVC makes the page of `dvc plots diff` between such branches, and of a picture."""
    rows = [{"rev": name, "iter": i, "loss": 2.0 + i} for name in NAMES for i in range(2)]
    figures = [VegaRenderer(rows, f"loss {name}", x="iter", y="loss", title=name) for name in NAMES]
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
    pictures = ImageRenderer([{"rev": name, "src": f"data:image;base64,{dot}"} for name in NAMES[:3]], "dot.png")
    (tmp_path / "template.html").write_text(page, encoding="utf-8")
    render_html([*figures, pictures], tmp_path / "index.html", tmp_path / "template.html")
    with chromium_page(offline=True) as browser:
        requests = []
        browser.on("request", lambda request: requests.append(request.url))
        browser.goto((tmp_path / "index.html").as_uri())
        browser.wait_for_function("document.querySelectorAll('main svg, main canvas').length >= 8")
        assert browser.locator("main > div").count() == len(NAMES)
        assert browser.title() == "Encore: curves"
        assert browser.locator("main > img").evaluate_all("all => all.map(one => one.alt)") == NAMES[:3]
        assert {url for url in requests if not url.startswith("data:image")} == {(tmp_path / "index.html").as_uri()}
        assert browser.problems == []


def test_figures_are_as_wide_as_the_screen(page: str, tmp_path: Path) -> None:
    """Legend included, on a phone and on a desk."""
    rows = [
        {"rev": rev, "iter": i, "loss": 2.0 + i} for rev in ("workspace", "a-long-name-of-a-branch") for i in (0, 1)
    ]
    (tmp_path / "template.html").write_text(page, encoding="utf-8")
    figure = VegaRenderer(rows, "loss", x="iter", y="loss", title="Loss")
    render_html([figure, figure], tmp_path / "index.html", tmp_path / "template.html")
    for width in (390, 1280):
        with chromium_page(offline=True, viewport={"width": width, "height": 800}) as browser:
            browser.goto((tmp_path / "index.html").as_uri())
            browser.wait_for_function("document.querySelectorAll('main .marks').length === 2")
            drawn = "[...document.querySelectorAll('main .marks')].map(one => one.getBoundingClientRect())"
            boxes = browser.evaluate(f"{drawn}.map(box => [box.left, box.right])")
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert all(left >= 0 and right <= width for left, right in boxes)
            assert min(right - left for left, right in boxes) > 0.4 * width
            assert browser.problems == []
