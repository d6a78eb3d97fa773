"""Reading JSON: what does not fit its schema is refused with a sentence, before anything uses it.

A file of Encore's own is sealed: it carries the sha256 of the rest of itself, so that a single other bit is found.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from encore.errors import EncoreError
from encore.files import write_json

SEAL = "own_sha256"
T = TypeVar("T")


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value with the sha256 of itself under `own_sha256`."""
    return {**value, SEAL: _hash(value)}


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a file for `read_sealed`. Raises ValueError on NaN and infinity."""
    write_json(path, seal(value))


def read_sealed(path: Path, schema: type[T], way_out: str = "") -> T:
    """What a sealed file of this schema holds, its seal too. Raises EncoreError, which ends with `way_out`, where it is
    missing or is not as Encore wrote it."""
    return parse_sealed(_read(path, way_out), schema, str(path), way_out)


def parse_sealed(data: bytes, schema: type[T], what: str, way_out: str = "") -> T:
    """As `read_sealed`, of bytes that messages call `what`."""
    value = _load(data, what, way_out)
    if not is_sealed(value):
        raise _failure(f"{what} has other bytes than Encore wrote (its own_sha256 differs)", way_out)
    return _check(value, schema, what, way_out)


def parse_old_too(data: bytes, schema: type[T], what: str, way_out: str = "") -> T:
    """As `parse_sealed`, but that a file from before there were seals has none."""
    value = parse_json(data, schema, what, way_out)
    return parse_sealed(data, schema, what, way_out) if isinstance(value, dict) and SEAL in value else value


def is_sealed(value: Any) -> bool:
    """Whether this carries the sha256 of the rest of itself."""
    return isinstance(value, dict) and value.get(SEAL) == _hash({k: v for k, v in value.items() if k != SEAL})


def parse_json(data: bytes, schema: type[T], what: str, way_out: str = "") -> T:
    """What JSON that nobody has sealed holds. Raises EncoreError where it does not fit the schema."""
    return _check(_load(data, what, way_out), schema, what, way_out)


def parse_yaml(data: bytes, schema: type[T], what: str, way_out: str = "") -> T:
    """As `parse_json`, of YAML as DVC reads it."""
    try:
        value = YAML(typ="safe").load(data.decode())
    except (YAMLError, ValueError) as error:
        raise _failure(f"{what} is not valid YAML ({str(error).splitlines()[0]})", way_out) from None
    return _check(value, schema, what, way_out)


def read_json(path: Path, schema: type[T], way_out: str = "") -> T:
    """As `parse_json`, of a file."""
    return parse_json(_read(path, way_out), schema, str(path), way_out)


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _failure(problem: str, way_out: str) -> EncoreError:
    return EncoreError(f"{problem}; {way_out}" if way_out else problem)


def _read(path: Path, way_out: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _failure(f"{path} is missing", way_out) from None


def _load(data: bytes, what: str, way_out: str) -> Any:
    try:
        return json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise _failure(f"{what} is not valid JSON ({error})", way_out) from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _check(value: Any, schema: type[T], what: str, way_out: str) -> T:
    adapter: TypeAdapter[T] = _adapter(cast(Any, schema))
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise _failure(f"{what} is not what belongs there ({where}: {first['msg']})", way_out) from None


@cache
def _adapter(schema: Any) -> TypeAdapter:
    return TypeAdapter(schema)


def flatten(nested: dict[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """A mapping without mappings in it; keys joined by a separator: a dot as DVC shows them, a slash as wandb does."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        is_nested = isinstance(value, dict)
        flat.update(flatten(value, separator, f"{prefix}{key}{separator}") if is_nested else {prefix + key: value})
    return flat
