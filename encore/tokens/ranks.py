"""Ranks: the tokens of a byte-pair vocabulary in the order in which their pairs are merged, in tiktoken's file format.

A line for each: its bytes in base64, and its rank, which is also its id.
"""

import base64
import binascii
from functools import cache
from pathlib import Path

from encore.errors import EncoreError


def write_ranks(ranks: dict[bytes, int]) -> bytes:
    """The bytes of a ranks file, in the order of the ranks."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a ranks file. Raises EncoreError where it is missing or damaged."""
    try:
        ranks = parse_ranks(path.read_bytes())
    except FileNotFoundError:
        raise EncoreError(f"{path} is missing; `dvc repro` makes it") from None
    except ValueError:
        raise EncoreError(f"{path} is not a file of byte-pair ranks; delete it and run `dvc repro`") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise EncoreError(f"{path} lacks some ranks; delete it and run `dvc repro`")
    return ranks


def parse_ranks(data: bytes) -> dict[bytes, int]:
    """What the bytes of a ranks file say. Raises ValueError where a line does not have its form."""
    ranks = {}
    for line in data.splitlines():
        token, rank = line.split()
        ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
    return ranks


def spell(token: bytes) -> str:
    """A token as a byte-level vocabulary writes it."""
    names = byte_characters()
    return "".join(names[byte] for byte in token)


@cache
def byte_characters() -> dict[int, str]:
    """The printable character by which a byte-level vocabulary writes each byte (GPT-2's `bytes_to_unicode`):
    printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
