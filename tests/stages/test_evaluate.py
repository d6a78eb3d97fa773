"""The evaluate stage against sums written out here."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from torch.nn import functional as F

from encore.download.task_data import fetch_tasks
from encore.errors import EncoreError
from encore.models.gpt2 import GPT2, GPT2Config
from encore.models.nanochat import NanoChat, NanoChatConfig
from encore.pretrained.model_folder import save_model
from encore.tokens.token_files import RANKS_FILE
from stages import evaluate
from tests.conftest import ROOT, TINY, pipeline_environment, write_page, write_tokens
from tests.ranks import launch_settings
from tests.token_folders import replace_shard

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path, tokens_folder, monkeypatch):
    """A random model in model/, beside the tokens, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENCORE_DEVICE", "cpu")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    fetch_tasks([], tokens_folder.parent / "tasks")
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=False))
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", model, (tokens_folder / RANKS_FILE).read_bytes(), {})
    return model.eval()


def run(tmp_path, **changes):
    write_page(tmp_path / "params.yaml", **{**TINY, "start": "ab", **changes})
    evaluate.main()
    return json.loads((tmp_path / "metrics/eval.json").read_text())["eval"]


def test_every_token_of_the_val_split_counts_once(model, tmp_path, tokens_folder):
    val = torch.from_numpy(np.fromfile(tokens_folder / "val_00000.bin", "<u2").astype(np.int64))
    assert len(val) == 700
    nats = 0.0
    with torch.no_grad():
        for start in range(0, 699, 16):  # 43 windows of 16 and one of 11
            idx, targets = val[start : min(start + 16, 699)], val[start + 1 : start + 17]
            nats += F.cross_entropy(model.logits(idx[None])[0].double(), targets, reduction="sum").item()
    result = run(tmp_path)
    assert result["tokens"] == 699
    assert result["loss"] == pytest.approx(nats / 699, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nats / 699), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / (3 * 700), rel=1e-6)


def test_a_nanochat_is_evaluated_and_writes(model, tmp_path, tokens_folder):
    """A model whose head is zeros gives each of the 300 ids the same score."""
    nanochat = NanoChat(NanoChatConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32))
    save_model(tmp_path / "model", nanochat, (tokens_folder / RANKS_FILE).read_bytes(), {})
    assert run(tmp_path)["loss"] == pytest.approx(math.log(300), rel=1e-6)
    assert (tmp_path / "metrics/samples.md").read_text().count("~~~~~~") == 2 * 3


def test_the_number_of_tokens_at_a_time_changes_nothing(model, tmp_path, monkeypatch):
    whole = run(tmp_path)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", {"cpu": 16})
    assert run(tmp_path)["loss"] == pytest.approx(whole["loss"], rel=1e-6)


@pytest.mark.usefixtures("forking")
def test_two_ranks_find_what_one_does(model, tmp_path, tokens_folder):
    val = np.fromfile(tokens_folder / "val_00000.bin", "<u2")
    val[[40, 300]] = 299  # three documents, so that there is a standard error
    replace_shard(tokens_folder, "val_00000.bin", val.tobytes())
    one = run(tmp_path)
    assert one["loss_standard_error"] > 0
    by_position = read_positions(tmp_path)
    environment = launch_settings(tmp_path, "--standalone --nproc-per-node=2")
    done = subprocess.run(
        [sys.executable, "-m", "stages.evaluate"],
        cwd=tmp_path,
        env=pipeline_environment(**environment),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("val loss") == 1
    two = json.loads((tmp_path / "metrics/eval.json").read_text())["eval"]
    for name in ("loss", "loss_standard_error", "perplexity", "bits_per_byte", "tokens", "documents"):
        assert two[name] == pytest.approx(one[name], rel=1e-6), name
    assert read_positions(tmp_path) == pytest.approx(by_position, rel=1e-6)


def test_the_curve_over_positions_and_the_speed(model, tmp_path, tokens_folder):
    result = run(tmp_path)
    positions = read_positions(tmp_path)
    counts = [44] * 11 + [43] * 5  # 43 windows of 16 and one of 11
    assert sum(map(math.prod, zip(positions, counts, strict=True))) / 699 == pytest.approx(result["loss"])
    assert result["documents"] == np.count_nonzero(np.fromfile(tokens_folder / "val_00000.bin", "<u2") == 299)
    assert result["tokens_per_second"] > 0


def read_positions(folder):
    """The losses of position.tsv, whose positions must count from 1."""
    rows = [line.split("\t") for line in (folder / "metrics/position.tsv").read_text().splitlines()]
    assert rows[0] == ["position", "loss"]
    assert [int(position) for position, _ in rows[1:]] == list(range(1, len(rows)))
    return [float(loss) for _, loss in rows[1:]]


def nanogpt_loss(model, val, batches, batch_size, block_size, random):
    """Means of random batches, as nanoGPT's estimate_loss draws them: windows that may overlap, from anywhere."""
    means = []
    for _ in range(batches):
        starts = random.integers(0, len(val) - block_size, batch_size)
        idx, targets = (torch.stack([val[s + d : s + d + block_size] for s in starts]) for d in (0, 1))
        with torch.no_grad():
            means.append(F.cross_entropy(model.logits(idx).flatten(0, 1), targets.flatten()).item())
    return np.array(means)


def test_the_loss_lies_within_the_noise_of_nanogpts_estimate(model, tmp_path, tokens_folder):
    """Of a split so long that what its windows happen to start with matters less than which ones are drawn."""
    random = np.random.default_rng(0)
    walk = np.cumsum(random.integers(0, 4, 30_000)) % 299
    shutil.rmtree(tokens_folder)
    write_tokens(tokens_folder, walk[:100], np.append(walk, 299), vocab_size=300, shard_tokens=10**6)
    means = nanogpt_loss(model, torch.from_numpy(walk), 50, 4, 16, random)
    error = means.std(ddof=1) / math.sqrt(len(means))
    assert 0 < error < 0.02
    assert run(tmp_path)["loss"] == pytest.approx(means.mean(), abs=3 * error)


def test_weights_from_transformers_have_the_loss_that_transformers_finds(tmp_path, tokens_folder, monkeypatch):
    """The way back: a folder that Encore has not made, but for the tokenizer's ranks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENCORE_DEVICE", "cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_positions=16, n_layer=2, n_head=2, n_embd=32)
    fetch_tasks([], tokens_folder.parent / "tasks")
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "model")
    shutil.copy(tokens_folder / RANKS_FILE, tmp_path / "model")
    val = torch.from_numpy(np.fromfile(tokens_folder / "val_00000.bin", "<u2").astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, 699, 16):
            window = val[start : start + 17][None]
            nats += (
                theirs(window[:, :-1], labels=window[:, :-1])
                .logits.double()
                .log_softmax(-1)[0]
                .gather(1, window[0, 1:, None])
                .neg()
                .sum()
                .item()
            )
    assert run(tmp_path)["loss"] == pytest.approx(nats / 699, rel=1e-6)


@pytest.mark.parametrize("fence", ["~~~~~~", "~~~~~~~~~~~", "```", "\r~~~~~~~\r"])
def test_no_text_ends_its_code_block(fence):
    texts = [f"a\n{fence}\n<script>alert(1)</script>\n{fence}text\nb", f"{fence}\n# c"]
    blocks = [token for token in MarkdownIt().parse(evaluate.as_markdown("> ", texts)) if token.type == "fence"]
    # CommonMark ends a line at a carriage return as well.
    assert [block.content for block in blocks] == [
        f"> {text}\n".replace("\r\n", "\n").replace("\r", "\n") for text in texts
    ]
    assert {block.info for block in blocks} == {"text"}


def test_samples_are_the_same_for_the_same_seed(model, tmp_path):
    run(tmp_path, num_samples=2)
    first = (tmp_path / "metrics/samples.md").read_text()
    run(tmp_path, num_samples=2)
    assert (tmp_path / "metrics/samples.md").read_text() == first
    assert first.startswith("# What the model writes\n\n## Sample 1\n\n~~~~~~text\nab")
    assert first.count("~~~~~~text\nab") == 2
    run(tmp_path, num_samples=2, seed=1)
    assert (tmp_path / "metrics/samples.md").read_text() != first


@pytest.mark.parametrize(("start", "prompt"), [("", [299]), ("ab", [97, 98])])
def test_an_empty_prompt_begins_where_documents_begin(model, tmp_path, monkeypatch, start, prompt):
    asked = []
    monkeypatch.setattr(evaluate, "generate", lambda model, ids, *rest: asked.append(ids) or [99])
    run(tmp_path, start=start, num_samples=1)
    assert asked == [prompt]
    assert f"~~~~~~text\n{start}c\n~~~~~~" in (tmp_path / "metrics/samples.md").read_text()


def test_a_loss_that_is_not_finite_is_no_result(model, tmp_path, tokens_folder):
    with torch.no_grad():
        model.wte.weight.mul_(1e38)  # finite, and the scores are not
        model.ln_f.weight.mul_(1e10)
    save_model(tmp_path / "model", model, (tokens_folder / RANKS_FILE).read_bytes(), {})
    with pytest.raises(EncoreError, match=r"^model has a loss of (nan|inf) over the val split; train again"):
        run(tmp_path)
    assert not (tmp_path / "metrics/eval.json").exists()
