"""encore/report/page.py and what it draws on: the page has the numbers of the files, and obeys none of their text."""

import csv
import hashlib
import html
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from encore.errors import EncoreError
from encore.report import tables
from encore.report.figures import datasets
from encore.report.page import about_several, render
from encore.report.results import add_clocks, load_results, read_params, read_tsv, split_samples
from encore.report.revisions import find_revision
from stages.evaluate import as_markdown
from tests.browser import chromium_page
from tests.conftest import PAGE, pipeline_environment

pytestmark = pytest.mark.usefixtures("forking")


def run_report(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "encore", "report", *arguments]
    return subprocess.run(command, cwd=repository, env=pipeline_environment(), capture_output=True, text=True)


@pytest.fixture
def here(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished repository as the working directory."""
    monkeypatch.chdir(finished)
    return finished


@pytest.fixture
def beside(compared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the experiment `longer` as the working directory."""
    monkeypatch.chdir(compared)
    return compared


def rows_of(page: str, section: str) -> dict[str, list[str]]:
    """The tables of a section: the cells of each row, without tags, by the row's first cell."""
    part = re.split(r'<h2 id="', page.split(f'<h2 id="{section}">')[1])[0]
    rows = {}
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", part, re.S):
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
        name, *values = (" ".join(html.unescape(re.sub(r"<[^>]*>", " ", cell)).split()) for cell in cells)
        rows[name] = values
    return rows


def datasets_of(page: str) -> dict[str, list[dict[str, Any]]]:
    found = re.search(r"^const datasets = (.*);$", page, re.M)
    assert found
    return json.loads(found[1])


def rows_of_file(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{key: float(cell) for key, cell in row.items()} for row in csv.DictReader(file, delimiter="\t")]


def test_the_numbers_of_the_page_are_those_of_the_files(here: Path) -> None:
    page = render([find_revision("workspace")])
    shown = rows_of(page, "numbers")
    for name in ("tokens", "eval"):
        numbers = json.loads((here / f"metrics/{name}.json").read_text())
        for key, value in numbers.get("eval", numbers).items():
            (cell,) = shown[key.replace("_", " ")]
            if value is None or isinstance(value, bool):  # one held-out document has no standard error
                assert cell == ("–" if value is None else str(value).lower())
            else:
                assert float(cell.replace(",", "")) == pytest.approx(value, rel=1e-4)
    parameters = rows_of(page, "parameters")
    assert parameters["max_iters"][0] == "12"
    assert parameters["token_cap"][0] == "300_000"
    assert parameters["lr_decay_iters"][0] == "null"
    lock = (here / "dvc.lock").read_text()
    facts = rows_of(page, "provenance")
    for path in ("data/raw", "data/tokens", "model"):
        (md5,) = facts[f"{path} (md5 in dvc.lock)"]
        assert re.search(rf"- path: {path}\n      hash: md5\n      md5: {re.escape(md5)}\n", lock)


def test_the_curves_of_the_page_are_those_of_the_files(here: Path) -> None:
    drawn = datasets_of(render([find_revision("workspace")]))
    for table, column in (("train", "lr"), ("train", "grad_norm"), ("speed", "tokens_per_second")):
        rows = rows_of_file(here / f"metrics/{table}.tsv")
        assert [(row["iter"], row[column]) for row in drawn[table]] == [(row["iter"], row[column]) for row in rows]
    expected = {
        "single steps": [row["loss"] for row in rows_of_file(here / "metrics/train.tsv")],
        "train": [row["train_loss"] for row in rows_of_file(here / "metrics/eval.tsv")],
        "val": [row["val_loss"] for row in rows_of_file(here / "metrics/eval.tsv")],
    }
    assert {name: [row["loss"] for row in drawn["losses"] if row["series"] == name] for name in expected} == expected
    # 4 sequences of 64 tokens, twice, an iteration.
    assert all(row["tokens"] == row["iter"] * 512 for table in ("losses", "train", "speed") for row in drawn[table])
    positions = rows_of_file(here / "metrics/position.tsv")
    assert [(row["position"], row["loss"]) for row in drawn["position"]] == [tuple(row.values()) for row in positions]


def test_hours_add_up_the_steps_before_a_row() -> None:
    curves: dict[str, list[dict[str, Any]]] = {
        "speed": [{"iter": 10, "ms_per_iter": 360.0}, {"iter": 30, "ms_per_iter": 720.0}],
        "eval": [{"iter": 0}, {"iter": 5}, {"iter": 20}, {"iter": 30}],
    }
    add_clocks(curves, tokens_per_iter=8)
    # 10 steps of 0.36 s and 20 of 0.72 s, an hour being 3600 s.
    assert [row["hours"] for row in curves["speed"]] == pytest.approx([0.001, 0.005])
    assert [row["hours"] for row in curves["eval"]] == pytest.approx([0, 0.0005, 0.003, 0.005])
    assert [row["tokens"] for row in curves["eval"]] == [0, 40, 160, 240]


def test_a_step_without_a_norm_is_a_gap() -> None:
    assert read_tsv(b"iter\tgrad_norm\n1\t\n2\t5e-05\n") == [
        {"iter": 1, "grad_norm": None},
        {"iter": 2, "grad_norm": 5e-5},
    ]


def test_each_parameter_has_its_meaning_and_group() -> None:
    params = read_params(PAGE.read_text())
    lines = dict(re.findall(r"^(\w+): .*? # (.*)$", PAGE.read_text(), re.M))
    assert {param.key: param.meaning for param in params} == lines
    assert list(dict.fromkeys(param.group for param in params)) == [
        "Data",
        "Model",
        "Training",
        "Watching",
        "Evaluation",
    ]
    groups = {param.key: param.group for param in params}
    assert (groups["split_seed"], groups["architecture"], groups["top_k"]) == ("Data", "Model", "Evaluation")


MIXTURE = """\
# Data
dataset:   # where from
  web: hf:owner/corpus
  code: files:code/*.txt
dataset_revision:   # which
  web: abc
  code: def
dataset_share:   # how much
  web: 0.8
  code: 0.2

# Model
n_layer: 2   # blocks
"""


def test_a_mixture_has_its_sources_in_title_and_provenance() -> None:
    params = read_params(MIXTURE)
    described = [(param.key, param.meaning, param.group) for param in params]
    assert described == [
        ("dataset", "where from", "Data"),
        ("dataset_revision", "which", "Data"),
        ("dataset_share", "how much", "Data"),
        ("n_layer", "blocks", "Model"),
    ]
    values = {param.key: param.value for param in params}
    assert tables.title(values) == "20 % code + 80 % web"
    assert tables.describe_data(values) == "20 % files:code/*.txt at def; 80 % hf:owner/corpus at abc"


def test_a_single_run_of_a_mixture_draws_the_val_loss_of_each_source() -> None:
    row = {"iter": 10, "tokens": 80, "hours": 0.1, "loss": 3.0}
    clocks = {key: row[key] for key in ("iter", "tokens", "hours")}
    losses = {"train_loss": 3.0, "val_loss": 3.2, "val_loss_code": 2.5, "val_loss_web": 3.4}
    curves = {"train": [row], "eval": [{**clocks, **losses, "train_loss_code": 1.0}], "speed": []}

    def of(name: str) -> Any:
        return SimpleNamespace(name=name, curves=curves, positions=[])

    drawn = {one["series"]: one["loss"] for one in datasets([of("a")])["losses"]}
    assert drawn == {"single steps": 3.0, "train": 3.0, "val": 3.2, "val, code": 2.5, "val, web": 3.4}
    assert {one["series"] for one in datasets([of("a"), of("b")])["losses"]} == {"train", "val"}


def test_samples_are_taken_apart_at_their_fences() -> None:
    markdown = (
        "# What\n\n## Sample 1\n\n~~~~~~text\ndef\n\n## no heading\n~~~~~~\n\n## Sample 2\n\n~~~~~~text\n\n~~~~~~\n"
    )
    assert split_samples(markdown) == [("Sample 1", "def\n\n## no heading"), ("Sample 2", "")]
    texts = ["a\n~~~~~~\n\n## Sample 9\n\n~~~~~~text\nb", "~~~~~~~~~", ""]
    assert split_samples(as_markdown("> ", texts)) == [(f"Sample {n}", f"> {text}") for n, text in enumerate(texts, 1)]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3_030_201, "3,030,201"),
        (3.1582246, "3.1582"),
        (21586.57, "21,587"),
        (1.5e6, "1,500,000"),
        (6e-5, "6e-05"),
        (True, "true"),
        (None, "–"),
        ("cpu, float32", "cpu, float32"),
    ],
)
def test_metrics_as_text(value: Any, shown: str) -> None:
    assert tables.as_text(value) == shown


@pytest.mark.parametrize(("key", "told"), [("vocab_size", True), ("dataset_revision", True), ("n_embd", False)])
def test_losses_that_cannot_be_compared_are_told_of(here: Path, key: str, told: bool) -> None:
    runs = [load_results(find_revision("workspace"))] * 2
    params = [replace(param, value="another") if param.key == key else param for param in runs[0].params]
    runs[1] = replace(runs[1], params=params)
    assert about_several(runs, [find_revision("workspace")] * 2)["other_text"] is told


def test_the_modules_that_differ_are_named() -> None:
    """One has another hash, one is new; of `tokenize` one run's list is nowhere."""

    def run(**md5: str) -> Any:
        return SimpleNamespace(lock={k: {"deps": [{"path": f"data/code/{k}.txt", "md5": v}]} for k, v in md5.items()})

    def revision(**texts: str) -> Any:
        return SimpleNamespace(
            read_output=lambda path: texts[name].encode() if (name := Path(path).stem) in texts else None
        )

    runs = [run(train="1", tokenize="1", evaluate="1"), run(train="2", tokenize="2", evaluate="1")]
    revisions = [
        revision(train="aa a.py\nbb b.py\n", tokenize="aa a.py\n"),
        revision(train="cc a.py\nbb b.py\nd c.py\n"),
    ]
    assert tables.differing_code(runs, revisions) == ["a.py", "c.py", "data/code/tokenize.txt"]
    assert tables.differing_code(runs[:1] * 2, revisions) == []


@pytest.mark.parametrize(
    ("value", "first", "shown"),
    [
        (300, 900, "-600"),
        (3.5, 3.0, "+0.5"),
        (4434.25, 33996.5, "-29,562"),
        (1.0, 1.0, ""),
        (True, False, ""),
        ("a", "b", ""),
        (None, 1, ""),
    ],
)
def test_differences(value: Any, first: Any, shown: str) -> None:
    assert tables.difference(value, first) == shown


def write_output(repository: Path, name: str, data: bytes) -> None:
    """Puts other bytes in the place of an output, and their hash into dvc.lock, as DVC does."""
    lock = (repository / "dvc.lock").read_text()
    old = hashlib.md5((repository / name).read_bytes()).hexdigest()
    assert old in lock
    (repository / "dvc.lock").write_text(lock.replace(old, hashlib.md5(data).hexdigest()))
    (repository / name).unlink()  # it may be a link into DVC's cache
    (repository / name).write_bytes(data)


NASTY = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> {{ 7 * 7 }} \u2028 &amp; 中"


def test_text_of_the_model_is_shown_and_not_obeyed(here: Path) -> None:
    write_output(here, "metrics/samples.md", f"## Sample {NASTY}\n\n~~~~~~text\n{NASTY}\n~~~~~~\n".encode())
    page = render([find_revision("workspace")])
    assert page.count("<script>") == page.count("</script") == 2
    assert "<img" not in page.split("<script>")[0]  # vega itself has the word
    (here / "report.html").write_text(page, encoding="utf-8")
    with chromium_page(offline=True) as browser:
        browser.goto((here / "report.html").as_uri())
        assert browser.evaluate("window.hacked") is None
        assert browser.locator("article pre").inner_text() == NASTY
        assert browser.problems == []


def test_an_edited_page_is_told_of_and_the_old_values_are_shown(here: Path) -> None:
    assert 'class="notice"' not in render([find_revision("workspace")])
    page = here / "params.yaml"
    page.write_text(re.sub(r"(?m)^max_iters: .*$", "max_iters: 5000", page.read_text()))
    report = render([find_revision("workspace")])
    assert "edited since these results were made (max_iters)" in report
    assert rows_of(report, "parameters")["max_iters"][0] == "12"


def test_before_the_first_run_it_is_a_sentence(finished: Path) -> None:
    (finished / "metrics/eval.json").unlink()
    done = run_report(finished)
    assert done.returncode == 1
    sentence = "metrics/eval.json is missing, so this run has not ended; `dvc repro` starts it or goes on with it"
    assert done.stderr == f"encore: {sentence}\n"
    assert not (finished / "report.html").exists()


def test_a_name_that_is_none_lists_the_experiments(beside: Path) -> None:
    with pytest.raises(
        EncoreError, match=r"^there is no experiment or commit named shorter; there are workspace, longer,"
    ):
        find_revision("shorter")
    with pytest.raises(EncoreError, match="named --all;"):
        find_revision("--all")


def test_two_runs_side_by_side(beside: Path) -> None:
    page = render([find_revision("workspace"), find_revision("longer")])
    assert rows_of(page, "parameters") == {"key": ["workspace", "longer"], "max_iters": ["12", "14"]}
    summary, facts, numbers = (rows_of(page, place) for place in ("summary", "provenance", "numbers"))
    assert summary["iter"] == ["12", "14 +2"]
    assert facts["versions"][0] == facts["versions"][1] != "–"
    assert numbers["iter"] == ["12", "14 +2"]
    assert numbers["tokens seen"] == ["6,144", "7,168 +1,024"]
    assert numbers["train tokens"][0] == numbers["train tokens"][1]
    committed = json.loads(subprocess.check_output(["git", "show", "HEAD:metrics/metrics.json"]))
    experiment = json.loads(
        subprocess.check_output(["git", "show", f"{find_revision('longer').commit}:metrics/metrics.json"])
    )
    was, now = committed["val"]["loss"], experiment["val"]["loss"]
    assert numbers["val.loss"] == [f"{was:.5g}", f"{now:.5g} {now - was:+.4g}"]
    assert summary["val loss"] == [f"{was:.4f}", f"{now:.4f} {now - was:+.4f}"]
    drawn = datasets_of(page)
    assert {(row["run"], row["series"]) for row in drawn["losses"]} == {
        (run, series) for run in ("workspace", "longer") for series in ("train", "val")
    }
    assert max(row["iter"] for row in drawn["train"] if row["run"] == "longer") == 14
    assert page.count("<article") == 2
    assert "The code differs" not in page
    assert "nats a token cannot be compared" not in page


def test_one_experiment_alone_has_its_own_numbers_and_samples(beside: Path) -> None:
    page = render([find_revision("longer")])
    assert rows_of(page, "parameters")["max_iters"][0] == "14"
    assert page.count("<article") == 1
    assert 'id="pipeline"' not in page


def test_samples_that_are_nowhere_are_said_to_be(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    subprocess.run(["rm", "-rf", ".dvc/cache"], check=True)
    page = render([find_revision("HEAD")])
    assert "Those of HEAD are not on this machine" in page
    assert load_results(find_revision("HEAD")).samples is None


def nearest_numbers(page: Any) -> dict[str, str]:
    """What the first figure says of the point nearest to its middle."""
    page.locator(".plot svg").first.hover()
    rows = page.locator("#vg-tooltip-element tr").all_inner_texts()
    return dict(re.split(r"\s+", row.strip(), maxsplit=1) for row in rows)


@pytest.mark.parametrize("names", [["workspace"], ["workspace", "longer"]], ids=["one", "two"])
def test_it_renders_offline_on_any_screen(beside: Path, tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / "report.html"
    assert run_report(beside, *names, "--out", str(path)).stdout == f"Report: {path}\n"
    for scheme, width in (("light", 1280), ("dark", 390)):
        with chromium_page(offline=True, color_scheme=scheme, viewport={"width": width, "height": 800}) as page:
            requests: list[str] = []
            page.on("request", lambda request, seen=requests: seen.append(request.url))
            page.goto(path.as_uri())
            page.wait_for_function("document.querySelectorAll('.plot svg').length === 6")
            marks = page.evaluate(
                "[...document.querySelectorAll('.plot')].map(e => e.querySelectorAll('.mark-line path').length)"
            )
            losses = 3 if len(names) == 1 else 4
            assert marks[:2] == [losses, losses]
            assert marks[2:] == [len(names)] * 4
            assert page.evaluate("document.documentElement.scrollWidth") == width
            ends = "[...document.querySelectorAll('.plot svg')].map(figure => figure.getBoundingClientRect().right)"
            assert max(page.evaluate(ends)) <= width
            assert nearest_numbers(page)["iter"] in {"0", "3", "4", "6", "8", "9", "10", "12", "14"}
            assert nearest_numbers(page)["run"] in names
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            label = page.evaluate("document.querySelector('.plot .role-axis-label text').getAttribute('fill')")
            assert (background, label) == {
                "light": ("rgb(252, 252, 251)", "#63635e"),
                "dark": ("rgb(22, 22, 21)", "#a3a39c"),
            }[scheme]
            assert page.problems == []
            assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
