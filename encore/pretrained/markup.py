"""Text of others, shown in a page or a Markdown file: as the same characters, and as nothing else."""

import html
import re

# What means something to Markdown within a line; a colon before slashes, and a dot after www, would make an address.
MARKS = re.compile(r"[\\`*_\[\]<>|&~$@^#]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def as_html(text: str) -> str:
    """HTML, for an element or a quoted attribute, that a browser reads back as the same characters. It has no NUL."""
    return html.escape(text).replace("\r", "&#13;").replace("\0", "\ufffd")


def as_markdown(text: str) -> str:
    """Markdown for the middle of a line, a cell of a table too; what would end the line becomes a blank."""
    return MARKS.sub(r"\\\g<0>", " ".join(text.split()))


def as_markdown_code(text: str) -> str:
    """The same in the type of code, unless the text has what could end it."""
    return as_markdown(text) if re.search(r"[`|\\\s]", text) or not text else f"`{text}`"
