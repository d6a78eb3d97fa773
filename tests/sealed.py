"""Files that carry the sha256 of the rest of themselves, reckoned here on its own."""

import hashlib
import json
from pathlib import Path
from typing import Any


def with_seal(value: dict[str, Any]) -> dict[str, Any]:
    """The value under the hash that belongs to it."""
    rest = without_seal(value)
    return {**rest, "own_sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def without_seal(value: dict[str, Any]) -> dict[str, Any]:
    return {key: each for key, each in value.items() if key != "own_sha256"}


def write_with_seal(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(with_seal(value)))


def change_sealed(path: Path, **changes: Any) -> None:
    """Gives a file some other values, as one who writes it anew would."""
    write_with_seal(path, {**json.loads(path.read_text()), **changes})


def read_with_seal(data: bytes | str) -> dict[str, Any]:
    """The value without the hash, which must be its own."""
    value = json.loads(data)
    assert value == with_seal(value)
    return without_seal(value)
