"""Encore's library. What all of it shares lies here; each folder is a room for one step from the text to the report.

The rooms, and which of them may import which, are listed once: `tool.importlinter` in pyproject.toml, which `make test`
checks. docs/architecture.md walks through them. For programs of your own there are `load`, `evaluate` and
`TokenWindows` (docs/library.md).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from encore.library import LanguageModel, TokenWindows, evaluate, load

__all__ = ["LanguageModel", "TokenWindows", "evaluate", "load"]


def __getattr__(name: str) -> Any:
    """Imports the library when it is used: it needs torch, which takes two seconds, and most commands do not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from encore import library

    return getattr(library, name)
