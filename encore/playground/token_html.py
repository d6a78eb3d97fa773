"""Sampled tokens as HTML: a span each, tinted by how surprising it was, with what the tooltip says of it.

Written here, since gradio's HighlightedText has one label for a token and no table of the likeliest.

A probability is the model's own: the softmax of its scores, before temperature, top-k and top-p.
"""

import codecs
import json
import math
from typing import NamedTuple

import tiktoken
import torch

from encore.pretrained.markup import as_html

ALTERNATIVES = 5
STRONGEST_BITS = 10  # a surprise of this and more, a probability of a thousandth and less, has the full tint

# The colour of a surprise, over the page's own background, light or dark.
CSS = """
.written { font-family: var(--font-mono); line-height: 1.7; white-space: pre-wrap; overflow-wrap: anywhere; }
.written { min-height: 10rem; }
.written .prompt { font-weight: 600; }
.token, .swatch { background: rgb(234 88 12 / calc(var(--surprise) * 50%)); border-radius: 2px; }
.token:hover { outline: 1px solid currentcolor; }
.newline::before { content: "↵"; opacity: 0.4; }
.swatch { padding: 0 0.4em; white-space: nowrap; }
.legend .html-container { padding: 0 !important; }
.tip { position: fixed; z-index: 1000; pointer-events: none; padding: 0.4rem 0.6rem; border-radius: 6px; }
.tip { font: 13px/1.5 var(--font-mono); white-space: pre; color: var(--body-text-color); }
.tip { background: var(--background-fill-primary); border: 1px solid var(--border-color-primary); }
.tip { box-shadow: 0 2px 8px #0005; }
.tip table { margin: 0; }
.tip table + table { margin-top: 0.6em; }
.tip table td { padding: 0; }
.tip table td:first-child { text-align: right; padding-right: 0.8em; }
.tip .drawn { font-weight: 700; color: var(--color-accent); }
"""

# Where the spans go; gradio fills in the value.
TEXT = '<div class="written">${value}</div>'

# Shows a token's tables beside it. `element` is what gradio puts TEXT into, anew whenever the value changes.
TOOLTIP = """
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
element.parentElement.append(tip);
const hide = () => { tip.hidden = true; };
element.addEventListener("mouseover", (event) => {
  const token = event.target.closest(".token");
  if (!token) return hide();
  tip.replaceChildren(...JSON.parse(token.dataset.tables).map((rows) => {
    const table = document.createElement("table");
    for (const [name, probability, drawn] of rows) {
      const row = table.insertRow();
      row.className = drawn ? "drawn" : "";
      row.insertCell().textContent = (100 * probability).toFixed(2) + " %";
      row.insertCell().textContent = name;
    }
    return table;
  }));
  tip.hidden = false;
  const box = token.getClientRects()[0];
  const below = box.bottom + tip.offsetHeight + 4 < innerHeight;
  tip.style.top = (below ? box.bottom + 4 : box.top - tip.offsetHeight - 4) + "px";
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4)) + "px";
});
element.addEventListener("mouseleave", hide);
addEventListener("scroll", hide, true);
"""


class Choice(NamedTuple):
    """A token with its probability, and the likeliest tokens in its place with theirs, in falling order."""

    token: bytes
    probability: float
    likeliest: list[tuple[bytes, float]]


def describe(tokenizer: tiktoken.Encoding, token: int, scores: torch.Tensor) -> Choice:
    """What is to be said of an id that was drawn from scores (V,)."""
    probabilities = scores.double().softmax(dim=0)
    highest, ids = probabilities.topk(min(ALTERNATIVES, len(scores)))
    names = [tokenizer.decode_single_token_bytes(each) for each in ids.tolist()]
    return Choice(
        tokenizer.decode_single_token_bytes(token),
        float(probabilities[token]),
        list(zip(names, highest.tolist(), strict=True)),
    )


class TokenSpans:
    """Makes the spans, one token after the other. A character may take several tokens; these share a span."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._choices: list[Choice] = []

    def add(self, choice: Choice) -> str:
        """The span that this token completes; nothing while the bytes end inside a character."""
        self._choices.append(choice)
        self._text += self._decoder.decode(choice.token)
        unfinished, _ = self._decoder.getstate()
        return "" if unfinished else self._take_span()

    def finish(self) -> str:
        """The span of what is left where the text ends inside a character."""
        self._text += self._decoder.decode(b"", final=True)
        return self._take_span() if self._choices else ""

    def _take_span(self) -> str:
        span = token_span(self._text, self._choices)
        self._text, self._choices = "", []
        return span


def token_span(text: str, choices: list[Choice]) -> str:
    """A span of text, with a table for each of its tokens in `data-tables`: rows of name, probability, whether it is
    the token that was drawn. A token that is not among the likeliest has a row behind them."""
    tables = []
    for token, probability, likeliest in choices:
        rows = [(name, share, name == token) for name, share in likeliest]
        if not any(drawn for _, _, drawn in rows):
            rows.append((token, probability, True))
        tables.append([[quote(name), float(f"{share:.4g}"), drawn] for name, share, drawn in rows])
    probability = math.prod(choice.probability for choice in choices)
    classes = "token newline" if "\n" in text else "token"
    return (
        f'<span class="{classes}" style="--surprise: {surprise(probability):.2f}" '
        f'data-tables="{as_html(json.dumps(tables))}">{as_html(text)}</span>'
    )


def surprise(probability: float) -> float:
    """The strength of the tint, from 0 to 1."""
    return math.log2(1 / max(probability, 2**-STRONGEST_BITS)) / STRONGEST_BITS


def legend() -> str:
    """What the tint and the numbers mean, as HTML."""
    swatches = " ".join(
        f'<span class="swatch" style="--surprise: {surprise(share):.2f}">{name}</span>'
        for share, name in ((1, "100 %"), (0.3, "30 %"), (0.1, "10 %"), (0.01, "1 %"), (0.001, "0.1 %"))
    )
    return (
        f"<p>Tinted by probability: {swatches}</p><p>It is the model's own, at temperature 1 and among all tokens; "
        "temperature, top-k and top-p change what is drawn, not these numbers.</p>"
    )


def quote(token: bytes) -> str:
    """A token in quotes, with escapes for what cannot be seen or is no whole character."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token).removeprefix("b")
