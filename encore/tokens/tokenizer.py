"""Tokenizers: always a `tiktoken.Encoding`, from the published GPT-2 ranks or from ranks trained on the corpus.

A tokenizer is wholly given by its ranks (ranks.py). Text is split by GPT-2's pattern. The end-of-text token has
the id that follows the last rank.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from encore.errors import EncoreError
from encore.tokens.ranks import byte_characters, read_ranks

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 splits text before it merges bytes (OpenAI's encoder.py, in the faster form that tiktoken publishes).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Learning takes the square of a word's length: what the pattern leaves longer than this is learned from in pieces.
# Words of prose and source code are shorter, so that it changes nothing there.
LEARNED_CHARACTERS = 2_000


def train_bpe(documents: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Learns `vocab_size - 1` ranks (one id is the end-of-text token's): 256 bytes, then merges as they were learned.

    Byte-pair encoding as in Sennrich et al. 2016 on bytes, as in GPT-2. Raises EncoreError where the documents do not
    hold enough distinct pairs. Time: in proportion to the text.
    """
    learner = Tokenizer(models.BPE())
    # The library's regex engine has no possessive quantifiers, and its `$` is the end of any line: `\z` is the text's.
    # With greedy quantifiers and that, the pattern splits the same, but that its words have an end.
    pattern = re.sub(r"\+\+?", f"{{1,{LEARNED_CHARACTERS}}}", GPT2_PATTERN).replace("$", r"\z")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    learner.train_from_iterator(documents, trainer)
    byte_of = {character: byte for byte, character in byte_characters().items()}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token, _ in sorted(learner.get_vocab().items(), key=lambda item: item[1]):
        ranks.setdefault(bytes(byte_of[character] for character in token), len(ranks))
    if len(ranks) != vocab_size - 1:
        raise EncoreError(
            f"vocab_size: {vocab_size} is more than this corpus can fill; set vocab_size: {len(ranks) + 1}, for which "
            "it has pairs, or a smaller one, or use more text"
        )
    return ranks


def load_tokenizer(path: Path) -> tiktoken.Encoding:
    """The tokenizer of a ranks file. Raises EncoreError where it is missing or damaged."""
    return make_tokenizer(read_ranks(path))


def make_tokenizer(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """A tokenizer that shares nothing with another one of the same ranks."""
    return tiktoken.Encoding(
        name="encore", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )
