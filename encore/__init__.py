"""Encore's library. What all of it shares lies here; each folder is a room for one step from the text to the report.

The rooms, and which of them may import which, are listed once: `tool.importlinter` in pyproject.toml, which `make test`
checks. docs/architecture.md walks through them.
"""
