"""The frame of the page that `dvc plots show` writes, with the plotting library inside, so that it opens offline.

DVC's own frame loads vega from the network. This one is written at set-up, from the bundle that vl-convert carries,
and DVC is told of it by `plots.html_template`.

What DVC puts into it holds names and titles of other people's branches, as they are. So it stands behind a tag from
which on a browser reads plain text, to the end of the page: nothing in it is a tag or a script. The script of this
page finds DVC's figures in that text, and the page's policy knows only this script and the library.
"""

import base64
import hashlib
from pathlib import Path

from encore.errors import run_stage
from encore.files import write_whole
from encore.report.vega import vega_script

TEMPLATE = Path(".dvc/plots_template.html")
# DVC writes a figure as a script that hands a specification, as JSON, to vegaEmbed; an image as a tag.
DRAW = r"""
addEventListener("DOMContentLoaded", () => {
  const main = document.querySelector("main");
  const add = (tag) => main.appendChild(document.createElement(tag));
  const text = document.querySelector("plaintext").textContent;
  for (const [, spec] of text.matchAll(/^\s*var spec = (.*);\n\s*vegaEmbed\(/gm)) {
    const place = add("div");
    const fail = (error) => { place.textContent = "This figure could not be drawn: " + error; console.error(error); };
    try {
      const figure = JSON.parse(spec);
      if (figure.layer || figure.mark) figure.width = "container";  // of several figures in one, each has its own
      vegaEmbed(place, figure, { config: { legend: { orient: "bottom", columns: 1 } } }).catch(fail);
    } catch (error) { fail(error); }
  }
  for (const [, name, source] of text.matchAll(/<p>(.*)<\/p>\s*<img src="(.*)">\s*<\/div>/g)) {
    const image = add("img");
    [image.alt, image.title, image.src] = [name, name, source];
  }
});
"""
# Vega compiles its expressions: unsafe-eval. Images are the repository's own files, or in the page.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src {hashes} 'unsafe-eval'; \
style-src 'unsafe-inline'; img-src 'self' file: data:; base-uri 'none'; form-action 'none'">
{refresh_tag}
<title>Encore: curves</title>
<style>
  body { font: 15px system-ui, sans-serif; margin: 2em; color: #1a1a1a; background: #fff; }
  main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34em), 1fr)); gap: 2em; }
  main > div { overflow-x: auto; width: 100%; }
  img { max-width: 100%; }
  @media (max-width: 600px) { body { margin: 1em; } }
  plaintext { display: none; }
</style>
<script>{library}</script>
<script>{draw}</script>
</head>
<body>
<main></main>
<plaintext>
{plot_divs}
"""


def main() -> None:
    write_whole(TEMPLATE, make_template().encode())


def make_template() -> str:
    """The page, with `{refresh_tag}` and `{plot_divs}` for DVC to fill in."""
    scripts = {"library": vega_script(), "draw": DRAW}
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts.values())
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    page = PAGE.replace("{hashes}", hashes)
    for name, script in scripts.items():
        page = page.replace(f"{{{name}}}", script)
    return page


if __name__ == "__main__":
    run_stage(main)
