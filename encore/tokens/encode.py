"""From documents to runs of token ids, on all cores and always in the order of the documents.

Threads, not processes: tiktoken lets go of Python's lock while it encodes. Each thread has a tokenizer of its own,
since one that is shared makes its users wait for each other (two threads then do 1.4 times the work of one, not 2).
"""

import os
import re
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import tiktoken

from encore.errors import EncoreError
from encore.tokens.documents import is_val
from encore.tokens.token_files import token_dtype
from encore.tokens.tokenizer import END_OF_TEXT, make_tokenizer

BATCH_BYTES = 500_000  # of text: a longer document is encoded in pieces
UNBROKEN_BYTES = 1_000_000  # a longer run without a blank is cut where it must not be
BATCHES_AHEAD = 4  # for each worker, between reading and writing
END_OF_TEXT_BYTES = END_OF_TEXT.encode()
# A blank that follows anything but white space. No match of GPT2_PATTERN reaches across the place before it, since
# white space stands only first in a match, and nothing that the pattern looks ahead to lies behind it. So a text that
# is cut there encodes to the same ids. The look-behinds name all of Unicode's white space, in UTF-8.
BREAK = re.compile(
    rb"(?<![\t-\r\x1c-\x20])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])"
    rb"(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)[ \n]"
)
# Documents that are empty are left out; one that holds the end-of-text token's name has it encoded as ordinary text;
# one without a blank for too long is cut.
EMPTY, WITH_END_OF_TEXT, CUT_SHORT = RULES = ("empty_documents", "documents_with_end_of_text", "cut_documents")


class Piece(NamedTuple):
    """A document, or a piece of a long one.

    number: the document's. text: UTF-8. document_bytes: of all of the document's text, in its last piece; None before.
    """

    number: int
    text: bytes
    document_bytes: int | None


@dataclass
class Batch:
    """The unit of work: consecutive pieces of both splits.

    remarks: the documents for which there is a rule, each with its number and the rule, one of RULES.
    """

    train: list[Piece] = field(default_factory=list)
    val: list[Piece] = field(default_factory=list)
    remarks: list[tuple[int, str]] = field(default_factory=list)
    text_bytes: int = 0


@dataclass(frozen=True)
class Tokens:
    """Encoded documents of one split, laid end to end, each followed by the end-of-text token.

    Behind the last end there may be a document that goes on in the next batch.

    ids: (n,). ends: (d,) the index just behind each document that ends here. text_bytes, numbers: (d,) of these.
    """

    ids: np.ndarray
    ends: np.ndarray
    text_bytes: np.ndarray
    numbers: np.ndarray

    def first(self, count: int) -> "Tokens":
        """The first `count` documents."""
        stop = int(self.ends[count - 1]) if count else 0
        return Tokens(self.ids[:stop], self.ends[:count], self.text_bytes[:count], self.numbers[:count])


class Encoded(NamedTuple):
    """The tokens of a batch's splits, and its remarks."""

    train: Tokens
    val: Tokens
    remarks: list[tuple[int, str]]


def gather_batches(documents: Iterable[tuple[int, bytes]], split_seed: int, val_fraction: float) -> Iterator[Batch]:
    """Gathers numbered documents, none of which is empty, to batches of about BATCH_BYTES, each document to the split
    that it belongs to."""
    batch = Batch()
    for number, text in documents:
        if b"|" in text and END_OF_TEXT_BYTES in text:  # a single byte is looked for much faster
            batch.remarks.append((number, WITH_END_OF_TEXT))
        of_split = "val" if is_val(number, split_seed, val_fraction) else "train"
        start = 0
        for stop, at_blank in cut(text):
            piece = text[start:stop] if stop - start < len(text) else text
            last = stop == len(text)
            getattr(batch, of_split).append(Piece(number, piece, len(text) if last else None))
            if not at_blank:
                batch.remarks.append((number, CUT_SHORT))
            batch.text_bytes += len(piece)
            if batch.text_bytes >= BATCH_BYTES:
                yield batch
                batch = Batch()
            start = stop
    yield batch


def learning_texts(
    documents: Iterable[tuple[int, bytes]], split_seed: int, val_fraction: float, most_bytes: int
) -> Iterator[str]:
    """The training documents in order, long ones in pieces, until they hold `most_bytes` of UTF-8: what a vocabulary is
    learned from."""
    total_bytes = 0
    for number, text in documents:
        if is_val(number, split_seed, val_fraction):
            continue
        start = 0
        for stop, _ in cut(text):
            yield text[start:stop].decode()
            start = stop
        total_bytes += len(text)
        if total_bytes >= most_bytes:
            return


def cut(text: bytes) -> Iterator[tuple[int, bool]]:
    """Where the pieces of a document end, the last at its end, and whether each ends at a place that changes no token.

    Pieces are BATCH_BYTES and what it takes to the next blank. Where none comes for UNBROKEN_BYTES, a piece ends behind
    some character, which may change the tokens there: byte-pair encoding of megabytes in a row takes their multiple
    in memory.
    """
    start = 0
    while len(text) - start > BATCH_BYTES:
        stop = start + BATCH_BYTES
        blank = BREAK.search(text, stop, stop + UNBROKEN_BYTES)
        if blank:
            start = blank.start()
        elif len(text) - stop <= UNBROKEN_BYTES:
            break
        else:
            start = stop + UNBROKEN_BYTES
            while text[start] & 0xC0 == 0x80:  # the middle of a character
                start -= 1
        yield start, blank is not None
    yield len(text), True


def encode_all(batches: Iterable[Batch], ranks: dict[bytes, int], workers: int) -> Generator[Encoded, None, None]:
    """Encodes batches with `workers` threads and yields them in order, a few ahead of the reader at most."""
    own = threading.local()

    def encode(batch: Batch) -> Encoded:
        if not hasattr(own, "tokenizer"):
            own.tokenizer = make_tokenizer(ranks)
        train, val = (encode_pieces(own.tokenizer, pieces) for pieces in (batch.train, batch.val))
        return Encoded(train, val, batch.remarks)

    pool = ThreadPoolExecutor(workers, "encode")
    waiting: deque[tuple[int, Future[Encoded]]] = deque()
    waiting_bytes = 0
    try:
        for batch in batches:
            waiting.append((batch.text_bytes, pool.submit(encode, batch)))
            waiting_bytes += batch.text_bytes
            while waiting_bytes > BATCHES_AHEAD * workers * BATCH_BYTES:
                text_bytes, future = waiting.popleft()
                waiting_bytes -= text_bytes
                yield future.result()
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


def encode_pieces(tokenizer: tiktoken.Encoding, pieces: list[Piece]) -> Tokens:
    """Exactly `encode_ordinary` of each document (no text is special), and the end-of-text id behind it.

    Documents are encoded together, with the end-of-text token's name between them, which no match of the pattern
    crosses. Where more of that token come out than documents end, some text holds its name: then each by itself.
    """
    ended = [piece for piece in pieces if piece.document_bytes is not None]
    text = b"".join(part for piece in pieces for part in (piece.text, _behind(piece)))
    ids = tokenizer.encode_to_numpy(text.decode(), allowed_special={END_OF_TEXT}, disallowed_special=())
    ends = np.flatnonzero(ids == tokenizer.eot_token) + 1
    if len(ends) > len(ended):
        ids = np.concatenate([_encode_by_itself(tokenizer, piece) for piece in pieces])
        ends = np.flatnonzero(ids == tokenizer.eot_token) + 1
    if ids.size and int(ids.max()) >= tokenizer.n_vocab:
        raise AssertionError(f"id {ids.max()} is outside the vocabulary of {tokenizer.n_vocab}")
    return Tokens(
        ids.astype(token_dtype(tokenizer.n_vocab)),
        ends,
        np.array([piece.document_bytes for piece in ended], np.int64),
        np.array([piece.number for piece in ended], np.int64),
    )


def _behind(piece: Piece) -> bytes:
    return b"" if piece.document_bytes is None else END_OF_TEXT_BYTES


def _encode_by_itself(tokenizer: tiktoken.Encoding, piece: Piece) -> np.ndarray:
    ids = tokenizer.encode_to_numpy(piece.text.decode(), disallowed_special=())
    return ids if piece.document_bytes is None else np.append(ids, np.uint32(tokenizer.eot_token))


def count_workers() -> int:
    """How many threads encode: ENCORE_WORKERS, else one for each core that this process may use."""
    wish = os.environ.get("ENCORE_WORKERS")
    if wish is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not wish.isdecimal() or int(wish) < 1:
        raise EncoreError(f"ENCORE_WORKERS is {wish!r}; give a whole number from 1 on, or unset it")
    return int(wish)
