"""Whether the ids of initial weights mean the tokens of the data: every tokenizer beside them is compared."""

import json
from pathlib import Path
from typing import Any

from encore.errors import EncoreError
from encore.pretrained.init_from import HUB_TOKENIZER, HUB_VOCABULARY, RANKS
from encore.tokens.ranks import parse_ranks, spell


def is_other_vocabulary(folder: Path, ranks: bytes) -> bool:
    """Whether a tokenizer in `folder` gives a token of the data, whose ranks are given, another id than these do.

    False where the folder has none. Raises EncoreError where one cannot be read.
    """
    own = folder / RANKS
    if own.exists() and own.read_bytes() != ranks:
        return True
    hubs = [path for path in (folder / HUB_TOKENIZER, folder / HUB_VOCABULARY) if path.exists()]
    wanted = {spell(token): rank for token, rank in parse_ranks(ranks).items()} if hubs else {}
    return any(_read_ids(path).get(token) != rank for path in hubs for token, rank in wanted.items())


def _read_ids(path: Path) -> dict[str, Any]:
    """The id of each token that a file of Hugging Face's spells, in the characters of a byte-level vocabulary."""
    try:
        content = json.loads(path.read_bytes())
        ids = content["model"]["vocab"] if path.name == HUB_TOKENIZER else content
    except (KeyError, TypeError, ValueError) as error:
        raise EncoreError(
            f"{path} is no tokenizer of Hugging Face's ({error!r}); mend it where init_from points to, or remove it, "
            "then `dvc repro -f download`"
        ) from None
    # Others than BPE have lists of tokens, which are not those of bytes.
    return ids if isinstance(ids, dict) else {}
