"""encore/plots_page.py: the frame of the curves' page opens without a network."""

import re
from pathlib import Path

import pytest
import vl_convert
from dvc_render.html import HTML

from encore import plots_page, vega


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("root"))
        plots_page.main()
        return Path(".dvc/plots_template.html").read_text(encoding="utf-8")


def split_page(page: str) -> tuple[str, str, str]:
    """What stands before the script, the script, and what stands behind it."""
    before, script_and_after = page.split("<script>", 1)
    script, after = script_and_after.split("</script>", 1)
    return before, script, after


def test_dvc_finds_its_places_and_brings_in_nothing_else(page: str) -> None:
    """DVC fills a template by replacing text, the library's too; its own scripts come from the network."""
    network = '<script src="https://cdn.example/vega.js"></script>'
    filled = HTML(page, refresh_seconds=7).with_scripts(network).with_element("<div>the curves</div>").embed()
    before, script, after = split_page(page)
    refresh = '<meta http-equiv="refresh" content="7">'
    assert filled == (
        before.replace("{refresh_tag}", refresh)
        + f"<script>{script}</script>"
        + after.replace("{plot_divs}", "<div>the curves</div>")
    )
    assert refresh in filled.split("<script>")[0]
    assert "<main>\n<div>the curves</div>\n</main>" in filled
    assert "min(100%, 34em)" in after


def test_the_plotting_library_is_inside_and_nothing_is_loaded(page: str) -> None:
    before, script, after = split_page(page)
    for tag in ("src=", "href=", "<link", "url(", "@import", "http"):
        assert tag not in before + after
    assert not re.search(r"<script[^>]+src\s*=\s*[\"']?https?:", script)
    assert "vegaEmbed" in script


def test_the_bundle_is_whole_and_ends_where_its_tag_ends(page: str) -> None:
    """A closing tag within the script would end it: the browser looks for nothing else."""
    assert page.count("</script") == 1
    _, script, _ = split_page(page)
    bundle = vl_convert.javascript_bundle(vega.SNIPPET)
    assert len(bundle) > 500_000
    assert script.replace(r"<\/script", "</script") == bundle.replace(r"<\/script", "</script")


def test_a_closing_tag_in_the_library_does_not_close_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda snippet: "let tag = '</script>'; let share = '50%';")
    plots_page.main()
    page = Path(".dvc/plots_template.html").read_text(encoding="utf-8")
    assert "<script>let tag = '<\\/script>'; let share = '50%';</script>" in page
