"""The frame of the page that `dvc plots show` writes, with the plotting library inside, so that it opens offline.

DVC's own frame loads vega from the network. This one is written at set-up, from the bundle that vl-convert carries,
and DVC is told of it by `plots.html_template`.
"""

from pathlib import Path

from encore.errors import run_stage
from encore.files import write_whole
from encore.vega import vega_script

TEMPLATE = Path(".dvc/plots_template.html")
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh_tag}
<title>Encore: curves</title>
<script>%s</script>
<style>
  body { font: 15px system-ui, sans-serif; margin: 2em; color: #1a1a1a; background: #fff; }
  main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%%, 34em), 1fr)); gap: 2em; }
  main > div { overflow-x: auto; }
  table { border-spacing: 1em .3em; }
</style>
</head>
<body>
<main>
{plot_divs}
</main>
</body>
</html>
"""


def main() -> None:
    write_whole(TEMPLATE, (PAGE % vega_script()).encode())


if __name__ == "__main__":
    run_stage(main)
