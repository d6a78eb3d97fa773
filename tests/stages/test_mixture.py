"""Two sources in one run, from download to evaluate: against a plain loop over the documents of each."""

import json
import math
import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from encore.devices.device import find_hardware
from encore.download import raw_folder
from encore.download.sources import current_revision
from encore.errors import EncoreError
from encore.evaluation.losses import evaluate_split
from encore.integrity import Verification
from encore.models.architectures import make_config, make_model
from encore.params import StageParams, load_params
from encore.scratch import scratch_folder
from encore.tokens import cluster, parts
from encore.tokens.batches import Windows
from encore.tokens.documents import RowGroup, is_val
from encore.tokens.ranks import write_ranks
from encore.tokens.token_files import SPLITS, TokenSplit
from encore.tokens.tokenizer import load_tokenizer, train_bpe
from encore.training.metrics import Records
from encore.training.trainer import Trainer
from stages import count_tokens, download, evaluate, tokenize
from tests.conftest import ROOT, TINY, read_page, write_page
from tests.raw_text import SEED, VAL_FRACTION, Corpus, joined, plain_loop, read_folder

TOKENS = Path("data/tokens")
TEXTS = {
    "code": [f"def f{n}(x):\n    return x ** {n % 9} + {n}\n" * (1 + n % 4) for n in range(400)],
    "prose": [f"The weather of day {n} was {'fair' if n % 3 else 'foul'}. " * (1 + n % 6) for n in range(1000)],
}
SHARES = {"prose": 0.7, "code": 0.3}
CAP = 12_000
CAPS = {"code": 3_600, "prose": 8_400}
SOURCES = {"code": "files:code/*.txt", "prose": "files:prose/*.jsonl"}
SMALL_PARTS = "import os\nfrom encore.tokens import parts\nparts.PART_TEXT_BYTES = 6_000\n"
KILL = """
write = parts.write_sealed
def write_and_die(path, value):
    write(path, value)
    if "part-00008" in str(path):
        os.kill(os.getpid(), 9)
parts.write_sealed = write_and_die
"""
RUN = "import stages.tokenize\nstages.tokenize.main()\n"
KEYS = {"vocab_size": 300, "val_fraction": VAL_FRACTION, "split_seed": SEED, "token_cap": CAP}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the text of two sources, of different forms, and a page that names both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENCORE_WORKERS", "1")
    monkeypatch.setattr(raw_folder, "ROW_GROUP_BYTES", 2_000)
    monkeypatch.setattr(parts, "PART_TEXT_BYTES", 6_000)
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    Path("code").mkdir()
    for number, text in enumerate(TEXTS["code"]):
        Path(f"code/{number:03d}.txt").write_text(text)
    Path("prose").mkdir()
    for name, start in (("a", 0), ("b", 500)):
        lines = (json.dumps({"body": text}) + "\n" for text in TEXTS["prose"][start : start + 500])
        Path(f"prose/{name}.jsonl").write_text("".join(lines))
    write_mixture()
    return tmp_path


def write_mixture(**changes: object) -> None:
    revisions = {name: current_revision(source) for name, source in SOURCES.items()}
    columns = {"prose": "body", "code": "text"}
    page = {"dataset": SOURCES, "dataset_revision": revisions, "dataset_share": SHARES, "text_column": columns, **KEYS}
    write_page(Path("params.yaml"), **{**page, **changes})


def run() -> dict[str, bytes]:
    """Downloads and tokenizes; the files of data/tokens."""
    download.main()
    tokenize.main()
    return read_folder(TOKENS)


def expected(caps: dict[str, int] = CAPS) -> dict[str, Corpus]:
    tokenizer = load_tokenizer(TOKENS / "tokenizer.tiktoken")
    return {name: plain_loop(tokenizer, TEXTS[name], cap) for name, cap in caps.items()}


def test_each_source_gives_its_share_to_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    folder, corpora = run(), expected()
    manifest = json.loads(folder["manifest.json"])
    for split in SPLITS:
        assert joined(folder, split) == b"".join(corpora[name].as_bytes(split) for name in ("code", "prose"))
    assert [source["name"] for source in manifest["sources"]] == ["code", "prose"]
    for source in manifest["sources"]:
        name, corpus = source["name"], corpora[source["name"]]
        assert (source["token_cap"], source["cap_reached"]) == (CAPS[name], True)
        assert source["dataset"] == SOURCES[name]
        for split in SPLITS:
            said = source["splits"][split]
            assert (said["tokens"], said["documents"]) == (len(corpus.ids[split]), len(corpus.numbers[split]))
            assert said["text_bytes"] == sum(len(TEXTS[name][number].encode()) for number in corpus.numbers[split])
            assert said["shards"] > 1
        ends = corpus.ends["train"]
        assert ends[-2] < CAPS[name] <= ends[-1] == source["splits"]["train"]["tokens"]

    capsys.readouterr()
    count_tokens.main()
    told = capsys.readouterr().out.splitlines()
    counted = json.loads(Path("metrics/tokens.json").read_bytes())
    train = {name: len(corpus.ids["train"]) for name, corpus in corpora.items()}
    total = sum(train.values())
    assert (counted["train_tokens"], counted["cap_reached"]) == (total, True)
    for name, of_source in counted["source"].items():
        texts = [TEXTS[name][number] for number in corpora[name].numbers["train"]]
        assert of_source == {
            "train_tokens": train[name],
            "train_documents": len(texts),
            "train_share": train[name] / total,
            "val_tokens": len(corpora[name].ids["val"]),
            "val_documents": len(corpora[name].numbers["val"]),
            "bytes_per_token": sum(map(len, texts)) / train[name],
            "cap_coverage": train[name] / CAPS[name],
        }
        assert of_source["train_share"] == pytest.approx(SHARES[name], abs=100 / CAP)
    assert told[1:] == [f"{name}: {train[name]:,} train tokens, {train[name] / total:.2%}" for name in train]


def test_the_order_of_the_page_is_no_matter() -> None:
    folder = run()
    write_mixture(dataset=dict(reversed(SOURCES.items())), dataset_share=dict(reversed(SHARES.items())))
    assert run() == folder


def test_neither_the_val_split_nor_the_text_of_a_source_depends_on_the_others(tmp_path: Path) -> None:
    """The held-out documents of prose are the same in a mixture of other shares, and where prose is alone."""
    run()
    mixed = expected()["prose"]
    write_mixture(dataset_share={"prose": 0.4, "code": 0.6})
    run()
    less = expected({"prose": 4_800})["prose"]
    assert mixed.numbers["val"][: len(less.numbers["val"])] == less.numbers["val"] != []
    alone = {"dataset": SOURCES["prose"], "dataset_revision": current_revision(SOURCES["prose"])}
    write_mixture(**alone, dataset_share=None, text_column="body", token_cap=CAPS["prose"])
    folder = run()
    corpus = plain_loop(load_tokenizer(TOKENS / "tokenizer.tiktoken"), TEXTS["prose"], CAPS["prose"])
    assert joined(folder, "val") == corpus.as_bytes("val")
    assert json.loads(folder["manifest.json"])["sources"][0]["name"] is None


def test_a_vocabulary_is_learned_from_each_source_by_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    training = {
        name: [text for number, text in enumerate(texts) if not is_val(number, SEED, VAL_FRACTION)]
        for name, texts in TEXTS.items()
    }

    def first(name: str, most_bytes: float) -> list[str]:
        ends = np.cumsum([len(text.encode()) for text in training[name]])
        return training[name][: int(np.searchsorted(ends, most_bytes)) + 1]

    monkeypatch.setattr(parts, "LEARNING_BYTES", 10_000)
    learned = {name: first(name, 10_000 * SHARES[name]) for name in TEXTS}
    expected_ranks = write_ranks(train_bpe([*learned["code"], *learned["prose"]], 300))
    assert run()["tokenizer.tiktoken"] == expected_ranks


@pytest.mark.parametrize(
    ("text_bytes", "expected"),
    [
        ([10**9, 10**9], [30_000_000, 70_000_000]),
        (
            [10**9, 10_000],
            [math.ceil(8_000 / 7 * 3), 10**8],
        ),
        ([700, 10**9], [10**8, math.ceil(560 / 3 * 7)]),
    ],
)
def test_a_scarce_source_lowers_what_is_learned_from_the_others(text_bytes: list[int], expected: list[int]) -> None:
    sources = [
        parts.SourceParts({}, cap, [RowGroup(Path(), "text", 0, 0, 0, 1, size, ())], range(1))
        for cap, size in zip((3, 7), text_bytes, strict=True)
    ]
    assert parts.share_learning_bytes(sources, val_fraction=0.2) == expected


@pytest.mark.slow
def test_killed_amid_the_second_source_it_goes_on_to_the_same_bytes() -> None:
    """The record of the ninth part is the last thing that the first attempt writes."""
    folder = run()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SMALL_PARTS + KILL + RUN], env=environment)
    assert done.returncode == -signal.SIGKILL
    finished = sorted(path.parent.name for path in Path(".encore").glob("tokens/*/part-*/part.json"))
    assert finished == [f"part-{number:05d}" for number in (0, 1, 5, 6, 7)], "of code up to its cap, and some of prose"
    subprocess.run([sys.executable, "-c", SMALL_PARTS + RUN], env=environment, check=True, capture_output=True)
    assert read_folder(TOKENS) == folder


def test_parts_that_other_machines_encode_are_those_of_each_source() -> None:
    download.main()
    write_mixture(token_cap=CAP // 3)
    tokenize.main()
    folder = read_folder(TOKENS)
    store = cluster.open_store(Path("data/raw"), load_params("tokenize"), scratch_folder())
    missing = cluster.list_missing(store, {})
    for source in store.sources:
        assert 0 < len(set(missing) & set(source.parts)) < len(source.parts)
    for index in missing:
        cluster.encode_part(store, index, threads=1)
    assert cluster.list_missing(store, dict.fromkeys(missing, 10**9)) == []
    tokenize.main()
    assert read_folder(TOKENS) == folder


def test_a_source_that_ends_early_is_told_with_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    write_mixture(token_cap=10**6)
    run()
    capsys.readouterr()
    count_tokens.main()
    corpora = expected({"code": 10**6, "prose": 10**6})
    notes = [line for line in capsys.readouterr().out.splitlines() if "note" in line]
    for (name, corpus), note in zip(corpora.items(), notes, strict=True):
        missing = round(SHARES[name] * 10**6) - len(corpus.ids["train"])
        assert note.startswith(
            f"encore: note: source {name} ended {missing:,} tokens ({missing / SHARES[name] / 10**6:.1%}) before "
            f"its share of token_cap; lower dataset_share.{name} or token_cap, or name a larger source. "
        )


def test_raw_text_of_other_sources_is_a_sentence() -> None:
    download.main()
    write_mixture(dataset_share={"prose": 0.5, "web": 0.5})
    page = {**json.loads(json.dumps(KEYS)), "dataset_share": {"prose": 0.5, "web": 0.5}, "tokenizer": "bpe"}
    manifest = json.loads(Path("data/raw/manifest.json").read_bytes())
    with pytest.raises(EncoreError) as error:
        parts.PartStore(Path("data/raw"), manifest, StageParams("tokenize", page), Path(".encore"))
    assert str(error.value) == "data/raw holds the text of other sources than params.yaml names; `dvc repro download`"


@pytest.mark.parametrize("name", ["code", "prose"])
def test_each_source_needs_documents_in_both_splits(name: str) -> None:
    write_mixture(dataset={**SOURCES, name: f"files:{name}-alone/*.txt"})
    Path(f"{name}-alone").mkdir()
    Path(f"{name}-alone/a.txt").write_text("one document")
    write_mixture(
        dataset={**SOURCES, name: f"files:{name}-alone/*.txt"},
        dataset_revision={
            **{other: current_revision(source) for other, source in SOURCES.items()},
            name: current_revision(f"files:{name}-alone/*.txt"),
        },
        text_column={"code": "text", "prose": "body"},
    )
    download.main()
    with pytest.raises(EncoreError, match=rf"^dataset\.{name}: the corpus is a single document"):
        tokenize.main()


@pytest.fixture
def trainer(root: Path) -> Trainer:
    """A tiny model on the mixture, before its first step."""
    run()
    values = {**read_page(), **TINY, "block_size": 16, "batch_size": 4, "eval_iters": 5}
    params = StageParams("train", values)
    torch.manual_seed(0)
    train, val = (Windows(TokenSplit(TOKENS, split), 16, split) for split in SPLITS)
    model = make_model(make_config(params, train.split.manifest["vocab_size"]))
    records = Records(Path("metrics"), Path("training.log"), None)
    Path("metrics").mkdir()
    hardware, data = find_hardware("float32", False), Verification({}, "")
    return Trainer(params, model, train, val, hardware, records, Path("checkpoints"), data)


def test_training_watches_the_loss_of_each_source(trainer: Trainer) -> None:
    """20 windows of each split, by the shares: 6 of code and 14 of prose."""
    trainer.evaluate()
    [row] = trainer.records.rows.eval
    corpora = expected()
    for split, windows in (("train", trainer.train), ("val", trainer.val)):
        ids = np.array(corpora["code"].ids[split] + corpora["prose"].ids[split])
        border, sums = len(corpora["code"].ids[split]), {}
        for name, start, stop in (("code", 0, border), ("prose", border, len(ids))):
            whole = [w for w in range(windows.count) if start <= w * 16 and w * 16 + 16 < stop]
            count = round(20 * (stop - start) / len(ids))
            taken = [whole[i * len(whole) // count] for i in range(count)]
            rows = np.stack([ids[w * 16 : w * 16 + 17] for w in taken])
            with torch.no_grad():
                inputs, targets = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
                losses = trainer.model.token_losses(inputs, targets).double()
            sums[name] = (losses.sum().item(), losses.numel())
            assert row[f"{split}_loss_{name}"] == pytest.approx(losses.mean().item(), rel=1e-6)
        nats, tokens = (sum(values) for values in zip(*sums.values(), strict=True))
        assert tokens == 20 * 16
        assert row[f"{split}_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    header = Path("metrics/eval.tsv").read_text().splitlines()[0].split("\t")
    assert header[:3] == ["iter", "train_loss", "val_loss"]
    assert header[3:] == [f"{split}_loss_{name}" for split in SPLITS for name in ("code", "prose")]
    assert f"val loss {row['val_loss']:.4f} (code {row['val_loss_code']:.4f}, prose" in Path("training.log").read_text()


def test_evaluate_tells_the_loss_of_each_source(trainer: Trainer) -> None:
    result = evaluate_split(trainer.model, trainer.val, 8, torch.device("cpu"), torch.float32)
    corpora = expected()
    border = len(corpora["code"].numbers["val"])
    for name, part in (("code", slice(0, border)), ("prose", slice(border, None))):
        numbers = evaluate.summarize(result.by_source[name])
        assert numbers["loss"] == pytest.approx(result.nats[part].sum() / result.tokens[part].sum(), rel=1e-12)
        text_bytes = sum(len(TEXTS[name][number].encode()) for number in corpora[name].numbers["val"])
        assert numbers["bits_per_byte"] == pytest.approx(result.nats[part].sum() / math.log(2) / text_bytes, rel=1e-12)
        assert numbers["documents"] == len(corpora[name].numbers["val"])
        assert numbers["tokens"] == len(corpora[name].ids["val"]) - (name == "code")  # the very first is no target
    assert sum(part.nats.sum() for part in result.by_source.values()) == pytest.approx(result.nats.sum(), rel=1e-12)


def test_a_source_too_short_for_a_window_is_left_out_of_the_curves(root: Path) -> None:
    run()
    val = TokenSplit(TOKENS, "val")
    code, prose = (source.tokens for source in val.sources)
    size = len(code) + 1  # the only window that begins in code ends in prose
    assert list(Windows(val, size, "val").spread_by_source(4)) == ["prose"]
    assert sha256(val.read(0, 1).tobytes()) is not None
    whole = Windows(val, val.tokens - 1, "val").spread_by_source(4)
    assert {name: windows.tolist() for name, windows in whole.items()} == {None: [0]}
    assert len(prose) > size
