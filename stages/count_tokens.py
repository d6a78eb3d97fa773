"""Counts the tokens again, from the bytes alone, and compares them with what the manifest and token_cap say."""

import math
import os
from pathlib import Path

import numpy as np

from encore.code import check_code
from encore.errors import run_stage
from encore.files import write_json
from encore.params import load_params
from encore.pipeline.stage_history import record_stage
from encore.schemas import TokenManifest, TokenSource
from encore.tokens.recount import SplitCount, add_up, recount
from encore.tokens.token_files import SPLITS, read_manifest
from stages import STARTED

TOKENS = Path("data/tokens")
METRICS = Path("metrics/tokens.json")


def main() -> None:
    check_code("count_tokens")
    params = load_params("count_tokens")
    counts = recount(TOKENS, params.token_cap, threads=os.cpu_count() or 1)
    train, val = (add_up([of_source[split] for of_source in counts]) for split in SPLITS)
    used = train.used | val.used
    manifest = read_manifest(TOKENS)
    sources = list(zip(manifest["sources"], counts, strict=True))
    shares = {
        source["name"]: describe_source(source, of_source, train.tokens)
        for source, of_source in sources
        if source["name"] is not None
    }
    write_json(
        METRICS,
        {
            **describe("train", train),
            **describe("val", val),
            "bytes_per_token": train.text_bytes / train.tokens,
            "val_bytes_per_token": val.text_bytes / val.tokens,
            "vocab_used": int(used.sum()) / len(used),
            "largest_id": int(np.flatnonzero(used)[-1]),
            "cap_reached": all(source["cap_reached"] for source in manifest["sources"]),
            "cap_coverage": train.tokens / params.token_cap,
            **({"source": shares} if shares else {}),
        },
    )
    print(f"train: {train.tokens:,} tokens of {params.token_cap:,} wanted, val: {val.tokens:,}")
    for name, share in shares.items():
        print(f"{name}: {share['train_tokens']:,} train tokens, {share['train_share']:.2%}")
    for source, of_source in sources:
        if of_source["train"].tokens < source["token_cap"]:
            print(f"encore: note: {explain_shortfall(of_source['train'], source, manifest)}")
    record_stage("count_tokens", METRICS, STARTED)


def describe_source(source: TokenSource, counts: dict[str, SplitCount], all_tokens: int) -> dict[str, int | float]:
    """What a mixture has of one source. all_tokens: the train tokens of all sources."""
    train, val = counts["train"], counts["val"]
    return {
        "train_tokens": train.tokens,
        "train_documents": train.documents,
        "train_share": train.tokens / all_tokens,
        "val_tokens": val.tokens,
        "val_documents": val.documents,
        "bytes_per_token": train.text_bytes / train.tokens,
        "cap_coverage": train.tokens / source["token_cap"],
    }


def describe(split: str, count: SplitCount) -> dict[str, int | float]:
    """A split's tokens and documents, and the tokens of a document: their mean, and what half of the documents and
    99 % of them do not exceed. The end-of-text token counts as the document's, as it does in every other number."""
    median, p99 = np.percentile(count.document_tokens, [50, 99], method="inverted_cdf").tolist()
    return {
        f"{split}_tokens": count.tokens,
        f"{split}_documents": count.documents,
        f"{split}_tokens_per_document": count.tokens / count.documents,
        f"{split}_tokens_per_document_p50": median,
        f"{split}_tokens_per_document_p99": p99,
    }


def explain_shortfall(train: SplitCount, source: TokenSource, manifest: TokenManifest) -> str:
    """Why there are fewer tokens of a source than it may have, by how much, and what to set."""
    name, token_cap = source["name"], source["token_cap"]
    missing = token_cap - train.tokens
    by_how_much = f"{missing:,} tokens ({missing / token_cap:.1%}) before {'its share of ' if name else ''}token_cap"
    if source["whole_source"] and name:
        reason = f"source {name} ended {by_how_much}; lower dataset_share.{name} or token_cap, or name a larger source"
    elif source["whole_source"]:
        reason = f"the source ended {by_how_much}; set token_cap: {train.tokens} to say so, or name a larger source"
    else:
        reckoned, measured = manifest["text_bytes_per_token"], train.text_bytes / train.tokens
        all_tokens = sum(source["token_cap"] for source in manifest["sources"])
        # The second ratio is the larger one where held-out documents have taken more than their share of the text.
        enough = round_up(all_tokens * max(measured / reckoned, token_cap / train.tokens))
        reason = (
            f"the downloaded text{f' of {name}' if name else ''} ended {by_how_much}; it has {measured:.2f} bytes a "
            f"token and download reckoned with {reckoned:.2f}; set token_cap: {enough} to have enough for "
            f"{token_cap:,} downloaded"
        )
    return f"{reason}. Training goes over the data more than once where max_iters asks for more"


def round_up(value: float) -> int:
    """The next whole number that has at most 3 digits before its zeros."""
    whole = math.ceil(value)
    unit = 10 ** max(0, len(str(whole)) - 3)
    return -(-whole // unit) * unit


if __name__ == "__main__":
    run_stage(main)
