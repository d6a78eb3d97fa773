"""What the playground shows, against sums of our own, and the page as Chromium shows it."""

import importlib.util
import io
import json
import math
import re
import signal
import socket
import subprocess
import sys
from html.parser import HTMLParser
from http.client import HTTPConnection
from itertools import pairwise

import pytest
import torch

from encore.errors import EncoreError
from encore.evaluation import generate as command
from encore.evaluation.generate import generate_with_scores
from encore.playground import page as play
from encore.playground.local_only import POLICY
from encore.playground.token_html import Choice, TokenSpans, describe, surprise
from encore.pretrained.model_folder import load_model
from encore.tokens.token_files import RANKS_FILE
from encore.tokens.tokenizer import load_tokenizer
from tests.browser import chromium_page
from tests.conftest import ROOT, pipeline_environment
from tests.forks import fast_starts
from tests.small_models import save_small_model

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ENCORE_DEVICE", "cpu")
    return save_small_model(tmp_path)


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder / RANKS_FILE)


def softmax(scores):
    """By hand, in float64 of Python."""
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / math.fsum(weights) for weight in weights]


class Spans(HTMLParser):
    """Reads spans back: (text, class, tables) of each."""

    def __init__(self, html):
        super().__init__()
        self.spans = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert tag == "span"
        values = dict(attrs)
        self.spans.append(["", values["class"], json.loads(values.get("data-tables", "[]"))])

    def handle_data(self, data):
        self.spans[-1][0] += data

    def text(self):
        return "".join(text for text, _, _ in self.spans)


def spans_of(tokens, probability=0.5):
    made = TokenSpans()
    html = "".join(made.add(Choice(token, probability, [(token, probability)])) for token in tokens)
    return Spans(html + made.finish()).spans


# Tokens.


def test_a_token_has_the_softmax_of_the_scores_and_the_likeliest_five(tokenizer):
    scores = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 3
    expected = softmax(scores.tolist())
    order = sorted(range(300), key=lambda id: -expected[id])
    for token in (order[0], order[3], order[200], 299):
        choice = describe(tokenizer, token, scores)
        assert choice.token == tokenizer.decode_single_token_bytes(token)
        assert choice.probability == pytest.approx(expected[token], rel=1e-12)
        assert [name for name, _ in choice.likeliest] == [tokenizer.decode_single_token_bytes(id) for id in order[:5]]
        assert [share for _, share in choice.likeliest] == pytest.approx([expected[id] for id in order[:5]], rel=1e-12)


def test_the_table_names_each_token_marks_the_drawn_one_and_keeps_four_digits():
    likeliest = [(b" a", 0.512345), (b"\n", 0.25), (b"\xe2\x82", 0.0000123456)]
    made = TokenSpans()
    ((_, _, (table,)),) = Spans(made.add(Choice(b"\n", 0.25, likeliest))).spans
    assert table == [["' a'", 0.5123, False], ["'\\n'", 0.25, True], ["'\\xe2\\x82'", 1.235e-05, False]]
    ((_, _, (table,)),) = Spans(made.add(Choice(b"'<", 0.001, likeliest))).spans
    assert table[3:] == [['"\'<"', 0.001, True]]
    assert not any(drawn for _, _, drawn in table[:3])


NASTY = "<b>&amp;</b> \"'`${1+1}{{value}}\\\n\n\t  é € 😀 \r\x07<|endoftext|> <script>alert(1)</script>"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_spans_hold_the_text_wherever_tokens_cut_it(size):
    data = NASTY.encode()
    tokens = [data[start : start + size] for start in range(0, len(data), size)]
    spans = spans_of(tokens)
    assert "".join(text for text, _, _ in spans) == NASTY
    assert sum(len(tables) for _, _, tables in spans) == len(tokens)
    assert {kind for text, kind, _ in spans if "\n" in text} == {"token newline"}
    assert {kind for text, kind, _ in spans if "\n" not in text} <= {"token"}


def test_tokens_that_share_a_character_share_a_span():
    spans = spans_of([b"a", b"\xe2", b"\x82", b"\xac", b"b"])
    assert [(text, len(tables)) for text, _, tables in spans] == [("a", 1), ("€", 3), ("b", 1)]


def test_bytes_that_never_become_a_character_are_told_as_the_command_tells_them():
    tokens = [b"\xff", b"\xe2", b"a", b"\xf0\x9f", b"b\xc3"]
    spans = spans_of(tokens)
    assert "".join(text for text, _, _ in spans) == b"".join(tokens).decode("utf-8", "replace")
    assert [(text, len(tables)) for text, _, tables in spans] == [("\ufffd", 1), ("\ufffda", 2), ("\ufffdb\ufffd", 2)]


def test_the_tint_is_the_surprise_of_all_tokens_of_a_span():
    assert [surprise(share) for share in (1.0, 0.5, 2**-4, 2**-10, 0.0)] == [0.0, 0.1, 0.4, 1.0, 1.0]
    made = TokenSpans()
    assert made.add(Choice(b"\xc3", 0.5, [])) == ""
    assert 'style="--surprise: 0.30"' in made.add(Choice(b"\xa9", 0.25, []))


# The text.

HOW = {"max_new_tokens": 30, "temperature": 1.3, "top_k": 250, "top_p": 0.98, "seed": 5}


def command_writes(monkeypatch, capsys, folder, prompt, **how):
    """What `encore generate` prints."""
    options = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["generate", "--model", str(folder), *options])
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt))
    command.main()
    return capsys.readouterr().out.removesuffix("\n")


def test_the_text_is_the_command_s_and_comes_token_by_token(monkeypatch, capsys, folder, tokenizer):
    monkeypatch.setattr(play, "UPDATE_SECONDS", 0)
    expected = command_writes(monkeypatch, capsys, folder, "ab\n<c>", **HOW)
    looks = list(play.write(load_model(folder), tokenizer, "ab\n<c>", **HOW))
    assert len(looks) == 31
    htmls = [html for html, _ in looks]
    assert all(later.startswith(earlier) for earlier, later in pairwise(htmls))
    assert Spans(htmls[-1]).text() == expected.replace("\0", "\ufffd")
    assert [note for _, note in looks[:2]] == ["1 of 30 tokens", "2 of 30 tokens"]
    assert looks[-1][1] == "30 of 30 tokens."


def test_top_k_of_0_is_among_all(monkeypatch, capsys, folder, tokenizer):
    how = {**HOW, "top_p": 1.0}
    del how["top_k"]
    expected = command_writes(monkeypatch, capsys, folder, "ab", **how)
    *_, (html, _) = play.write(load_model(folder), tokenizer, "ab", **{**how, "top_k": 0})
    assert Spans(html).text() == expected.replace("\0", "\ufffd")


def test_the_end_of_text_and_a_cut_prompt_are_told(folder, tokenizer):
    model = load_model(folder)
    with torch.no_grad():  # all weight on the end of text
        model.ln_f.weight.zero_()
        model.ln_f.bias = torch.nn.Parameter(model.wte.weight[299] * 1e4)
    ((html, note),) = play.write(model, tokenizer, "x" * 17, **HOW)
    assert html == f'<span class="prompt">{"x" * 17}</span>'
    assert (
        note
        == "Note: the prompt has 17 tokens; the model sees the last 16. 0 of 30 tokens, then the end-of-text token."
    )


@pytest.mark.parametrize("seed", [None, -1, 2**53])
def test_a_wrong_seed_is_told(folder, tokenizer, seed):
    ((html, note),) = play.write(load_model(folder), tokenizer, "x", **{**HOW, "seed": seed})
    assert (html, note) == ("", "Seed: a whole number from 0 to 9,007,199,254,740,991, please.")


# Starting.


def test_facts_of_the_model(folder):
    assert play.model_facts(folder, load_model(folder)) == (
        f"`{folder}`: 34,848 parameters · 2 layers, 2 heads, width 32 · 16 tokens of context · 300 ids · "
        "trained on `package:made-up` at `1.0`"
    )
    image = "![x](http://elsewhere/x.png)<img src=//elsewhere>`"
    record = {"bias": False, "data": {"dataset": f"files:{image}", "dataset_revision": 1}}
    (folder / "encore.json").write_text(json.dumps(record))
    assert play.model_facts(folder, load_model(folder)).endswith(
        r" · trained on files:!\[x\](http\://elsewhere/x.png)\<img src=//elsewhere\>\` at `1`"
    )
    sources = [{"dataset": f"files:{name}", "dataset_revision": name} for name in "ab"]
    (folder / "encore.json").write_text(json.dumps({"bias": False, "data": {"sources": sources}}))
    assert play.model_facts(folder, load_model(folder)).endswith(" · trained on `files:a` at `a`, `files:b` at `b`")
    (folder / "encore.json").write_text('{"bias": false}')
    assert play.model_facts(folder, load_model(folder)).endswith(" · 300 ids")


def test_a_missing_gradio_is_told(monkeypatch, folder):
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "no_proxy"):
        monkeypatch.setenv(name, "")  # to be restored
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["play", "--model", str(folder)])
    with pytest.raises(EncoreError, match=r"^gradio is not installed; `make play` installs it, and so does `pip inst"):
        play.main()


def start(folder, port):
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed (make play)")
    with fast_starts():
        return subprocess.Popen(
            [sys.executable, "-m", "encore", "play", "--model", str(folder), "--port", str(port)],
            cwd=ROOT,
            env=pipeline_environment(ENCORE_DEVICE="cpu"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def test_a_missing_model_is_told(tmp_path):
    process = start(tmp_path / "none", 1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output.startswith(f"encore: there is no folder {tmp_path}/none; `dvc repro train` makes model, --model na")


def test_a_port_in_use_is_told(folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        process = start(folder, port)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output == f"encore: port {port} is in use; end what serves there, or take another with --port\n"


@pytest.mark.parametrize("port", ["99999", "65536", "0", "-1"])
def test_a_port_that_is_none_is_told(monkeypatch, port):
    monkeypatch.setattr(sys, "argv", ["play", f"--port={port}"])
    with pytest.raises(EncoreError, match=rf"^--port {port}: ports are numbers from 1 to 65535; take one of them$"):
        play.main()


# The page.


def ask(address, host, **headers):
    """Status and headers of an answer."""
    connection = HTTPConnection(address.removeprefix("http://"))
    connection.putrequest("GET", "/", skip_host=True)
    for name, value in {"Host": host, **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders())


UNFINISHED = re.compile(r"^\d+ of 1,000 tokens$")


@pytest.fixture
def site(tmp_path):
    """The address of a playground whose model takes some seconds for 1,000 tokens, and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = save_small_model(tmp_path, n_layer=12, n_embd=128, block_size=64)
    process = start(folder, port)
    try:
        address = f"http://127.0.0.1:{port}"
        assert process.stdout.readline() == f"{address} serves the playground; Ctrl-C ends it\n"
        yield folder, address, process
    finally:
        process.kill()
        process.communicate()


def set_control(page, label, value):
    box = page.get_by_label(label).first
    box.fill(str(value))
    box.press("Enter")


def test_the_page_in_the_browser(monkeypatch, capsys, site):
    folder, address, process = site
    monkeypatch.setenv("ENCORE_DEVICE", "cpu")
    prompt = "Is 1 < 2 &amp; ${3}?\n  {{value}} é\n"
    how = {"max_new_tokens": 40, "temperature": 1.3, "top_k": 250, "top_p": 0.98, "seed": 7}
    expected = command_writes(monkeypatch, capsys, folder, prompt, **how)

    # A stranger's name for this machine is not answered, nor a stranger's page; what is answered may load nothing else.
    port = address.rpartition(":")[2]
    for own in (f"127.0.0.1:{port}", f"localhost:{port}"):
        status, headers = ask(address, own)
        assert (status, headers["content-security-policy"]) == (200, POLICY)
    for host, origin in (("evil.example", {}), ("evil.example", {"Origin": "http://evil.example"})):
        assert ask(address, f"{host}:{port}", **origin)[0] == 403
    assert ask(address, f"127.0.0.1:{port}", Origin="http://evil.example")[0] == 403

    with chromium_page() as page:
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.get_by_label("Prompt").fill(prompt)
        labels = ("Max new tokens", "Temperature", "Top-k", "Top-p", "Seed")
        for label, value in zip(labels, how.values(), strict=True):
            set_control(page, label, value)
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("40 of 40 tokens.").wait_for()
        assert page.locator(".written").text_content() == expected.replace("\0", "\ufffd")

        # Where the pointer is, the probability of that token.
        tokenizer, generator = load_tokenizer(folder / RANKS_FILE), torch.Generator().manual_seed(7)
        ids = tokenizer.encode_ordinary(prompt)
        scored = generate_with_scores(load_model(folder), ids, 40, 1.3, 250, 0.98, 299, generator)
        token, scores = next(scored)
        name = tokenizer.decode_single_token_bytes(token)
        page.locator(".written .token").first.hover()
        drawn = page.locator(".tip .drawn").first.inner_text()
        assert drawn.split("\t") == [
            f"{100 * softmax(scores.tolist())[token]:.2f} %",
            repr(name.decode()) if name.isascii() else repr(name).removeprefix("b"),
        ]
        page.get_by_label("Prompt").hover()
        assert page.locator(".tip").is_hidden()

        # A text that is stopped stays as it is, and the next one can be had.
        set_control(page, "Max new tokens", 1000)
        page.get_by_role("button", name="Generate").click()
        page.get_by_text(UNFINISHED).wait_for()
        page.get_by_role("button", name="Stop").click()
        page.wait_for_timeout(500)
        stopped = page.locator(".written").text_content()
        page.wait_for_timeout(500)
        assert page.locator(".written").text_content() == stopped
        assert page.get_by_text(UNFINISHED).is_visible()
        set_control(page, "Max new tokens", 40)
        page.get_by_label("Prompt").press("Shift+Enter")
        page.get_by_text("40 of 40 tokens.").wait_for()
        assert page.locator(".written").text_content() == expected.replace("\0", "\ufffd")

        assert requests
        assert all(url.startswith(f"{address}/") for url in requests)
        assert page.problems == []

        # Ctrl-C ends it, in the middle of a text too.
        set_control(page, "Max new tokens", 1000)
        page.get_by_role("button", name="Generate").click()
        page.get_by_text(UNFINISHED).wait_for()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    assert process.stdout.read() == ""
