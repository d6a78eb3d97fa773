"""The library that draws figures in a browser, as one script, so that pages which hold it open offline."""

import vl_convert

# Makes vega-embed a global name: scripts of DVC's pages and of the report call it.
SNIPPET = "window.vegaEmbed = vegaEmbed;"


def vega_script() -> str:
    """Vega, Vega-Lite and vega-embed, from the bundle that vl-convert carries; to stand between script tags."""
    # Inside a page, a script ends at the first closing tag, even one within a string.
    return vl_convert.javascript_bundle(SNIPPET).replace("</script", r"<\/script")
