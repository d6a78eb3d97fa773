"""encore/pretrained/markup.py: a browser and a Markdown renderer as judges."""

import string
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from encore.pretrained.markup import as_html, as_markdown, as_markdown_code

NASTY = [
    string.punctuation,
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "![x](http://elsewhere/x.png)",
    "[x](javascript:alert(1)) [y][z] [^1]",
    "`a` ``b`` *c* **d** _e_ __f__ ~~g~~",
    "a | b || c \\| d \\",
    "&lt;b&gt; &#60; &amp;",
    "http://elsewhere www.elsewhere.org WWW.a.b <http://a.b> me@elsewhere.org",
    "$a$ \\(b\\)",
    "\\`a\\`",
]


class Text(HTMLParser):
    """The tags and the text of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", [*NASTY, "a\n b\tc"])
def test_html_is_the_text_again(text: str) -> None:
    read = Text(f'<p title="{as_html(text)}">{as_html(text)}</p>')
    assert (read.tags, read.text) == (["p"], text)


def test_html_has_no_nul_and_keeps_a_carriage_return() -> None:
    assert as_html("a\0\r<") == "a\ufffd&#13;&lt;"


@pytest.mark.parametrize("escape", [as_markdown, as_markdown_code])
@pytest.mark.parametrize("text", NASTY)
def test_markdown_is_the_text_again(escape, text: str) -> None:
    """In a line and in the cell of a table, with what GitHub adds to CommonMark."""
    renderer = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    code = ["code"] if escape(text).startswith("`") else []
    read = Text(renderer.render(f"Text: {escape(text)} end"))
    assert (read.tags, read.text) == (["p", *code], f"Text: {text} end\n")
    read = Text(renderer.render(f"| a | b |\n|---|---|\n| {escape(text)} | end |"))
    assert read.tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", *code, "td"]
    assert read.text.split("\n")[-6:-3] == [text, "end", ""] or f"\n{text}\nend\n" in read.text


def test_an_address_is_broken_up() -> None:
    """GitHub and the Hub make links of bare addresses; markdown-it here does not."""
    assert as_markdown("http://a.b WWW.a.b me@a.b") == r"http\://a.b WWW\.a.b me\@a.b"


def test_a_line_that_ends_stays_in_its_line() -> None:
    assert as_markdown("a\n\n# b\r\n| c\u2028d") == r"a \# b \| c d"
    assert as_markdown_code("a\nb") == "a b"


def test_code_is_for_what_cannot_end_it() -> None:
    assert as_markdown_code("hf:owner/corpus_en") == "`hf:owner/corpus_en`"
    assert as_markdown_code("files:a`b") == r"files:a\`b"
    assert as_markdown_code("") == ""
