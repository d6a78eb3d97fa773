"""bench.gpu goes to its end without a GPU, as it will on a card that is lent for minutes."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pytest
import tiktoken
from pyarrow import parquet

from bench.gpu import __main__ as bench
from bench.gpu.learning import DOCUMENTS_A_VAL, encode_folder
from bench.gpu.speed import NanoGPT
from bench.train import ROOT
from encore.tokens.token_files import TokenSplit

pytestmark = pytest.mark.usefixtures("forking")


def run_tiny(part, **environment):
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--part", part]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows], done.stdout


def test_correctness_has_a_row_for_each_architecture_type_and_way():
    rows, _ = run_tiny("correctness")
    found = [tuple(row[:3]) for row in rows[2:]]
    assert found == [
        (architecture, dtype, how)
        for architecture in (
            *("gpt2", "nanochat", "nanochat-plus"),
            *("gpt2, documents masked", "nanochat-plus, documents masked"),
        )
        for dtype in ("float32", "bfloat16")
        for how in ("written", "compiled")
    ]
    assert all(float(row[4]) < (1e-4 if row[1] == "float32" else 0.15) for row in rows[2:])


def test_repeat_compares_three_trainings_of_a_page():
    rows, _ = run_tiny("repeat")
    assert len(rows) == 2 + 1
    for _, once, again, killed, verdict in rows[2:]:
        assert re.fullmatch("[0-9a-f]{12}", once)
        assert (again, killed, verdict) == (once, once, "the same")


def test_attention_has_a_row_for_each_kernel_which_a_cpu_mostly_lacks():
    rows, _ = run_tiny("attention")
    assert [row[1:4] for row in rows[2:]] == [
        [dtype, kernel, asked]
        for dtype in ("bfloat16", "float32")
        for kernel in ("flash", "memory-efficient", "cuDNN", "flex, compiled")
        for asked in ("yes", "no")
    ]
    for row in rows[2:]:
        if row[2] == "flash":
            assert float(row[4]) > 0
            assert row[6] == "yes"
        else:
            assert row[4:] == ["not here", "", ""]


def test_speed_has_every_recipe_the_ratios_and_a_profile():
    rows, output = run_tiny("speed")
    recipes = [row for row in rows if row[0].startswith(("GPT-2", "nanochat"))]
    assert len(recipes) == 6
    assert all(float(row[1]) > 0 for row in recipes)
    for expected in (
        r"^GPT-2 124M, 12 sequences: repeating costs [+-]\d+\.\d% of an iteration$",
        r"^nanochat-plus by Muon, 32 sequences: \d+\.\d\d times the iteration of GPT-2$",
        r"^evaluation: [\d,]+ tokens/s, \d+\.\d\d times training's$",
        r"^a process with everything compiled before has taken steps after \d+\.\d s$",
        r"^\| aten::mm \| \d+ \| \d+\.\d\d \|$",
    ):
        assert re.search(expected, output, re.MULTILINE), expected


def test_nanogpt_is_halted_once_it_is_warm_and_clocked_between_its_lines(tmp_path):
    """By a stand-in that logs as its train.py does, every second iteration."""
    (tmp_path / "train.py").write_text(
        "import time\n"
        "print('step 0: train loss 10.9, val loss 10.9')\n"
        "for iteration in range(11):\n"
        "    if iteration % 2 == 0:\n"
        "        print(f'iter {iteration}: loss 10.9, time 5.00ms, mfu -100.00%', flush=True)\n"
        "    time.sleep(0.05)\n"
    )
    command = [sys.executable, "train.py"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    nanogpt = NanoGPT(process, 2, 1000)
    nanogpt.wait_until_ready()
    deadline = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None
    result = nanogpt.do()
    assert process.returncode == 0
    assert result["seconds"] > 0.04
    assert result["tokens_per_second"] == 1000 / result["seconds"]


def test_a_nanogpt_that_fails_has_no_figures():
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"], stdout=subprocess.PIPE, text=True)
    nanogpt = NanoGPT(process, 2, 1000)
    nanogpt.wait_until_ready()
    assert nanogpt.do() == {}


def test_learning_has_a_loss_for_each_recipe():
    rows, _ = run_tiny("learning")
    assert [(row[0], row[3]) for row in rows[2:]] == [
        ("GPT-2", "36"),
        ("nanochat-plus", "9"),
        ("nanochat", "9"),
    ]
    # ln 300 is 5.7: the tokens are drawn at random, and nine iterations by the rule are as large as steps get.
    assert all(5.6 < float(row[5]) < 6.5 for row in rows[2:])


def test_text_is_the_same_in_every_way():
    rows, _ = run_tiny("text")
    assert [row[0] for row in rows[2:]] == ["Encore", "a pass a token, not recorded", "transformers, static cache"]
    assert all(row[3] == "the same" for row in rows[2:])


def test_a_part_that_fails_says_so_and_the_next_goes_on(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(bench, "PARTS", ("learning", "learning"))
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    monkeypatch.setenv("ENGLISH_TEXT_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^bench: failed: learning, learning$"):
        bench.main()
    captured = capfd.readouterr()
    assert captured.err.count(f"bench: ENGLISH_TEXT_DIR={tmp_path} holds no parquet files") == 2
    assert captured.out.count("bench: learning ended with exit code 1") == 2


def test_a_part_that_takes_too_long_ends_with_all_that_it_started_and_all_its_files(monkeypatch, capfd, tmp_path):
    """A nanoGPT that is halted holds memory of the GPU."""
    script = "sleep 100 & kill -STOP $!; echo $! > pid; mktemp -d > folder; wait"
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: real(["sh", "-c", script], cwd=tmp_path, **how))
    monkeypatch.setattr(bench, "SECONDS", 2)
    assert not bench.run_part("speed")
    assert "bench: speed was not through after 2 s" in capfd.readouterr().out
    halted = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(halted) or psutil.Process(halted).status() == psutil.STATUS_ZOMBIE
    assert not Path((tmp_path / "folder").read_text().strip()).parent.exists()


def test_a_folder_of_text_becomes_tokens_with_some_documents_in_val(monkeypatch, tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokenizer = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tokenizer)
    documents = [f"text {number}" for number in range(DOCUMENTS_A_VAL + 2)]
    parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "some.parquet")
    encode_folder(tmp_path, tmp_path / "tokens")
    for split, first, count in (("val", 0, 2), ("train", 1, DOCUMENTS_A_VAL)):
        tokens = TokenSplit(tmp_path / "tokens", split)
        expected = np.array([*documents[first].encode(), 256])
        np.testing.assert_array_equal(tokens.read(0, len(expected)), expected)
        assert (tokens.read(0, tokens.tokens) == 256).sum() == count
