"""README and docs: what they name is there, and the values that they list are those of the files."""

import re
import subprocess

import pytest
from ruamel.yaml import YAML

from encore.__main__ import COMMANDS
from encore.mixture import split_cap
from encore.params import find_problems
from tests.conftest import ROOT, read_page

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
PRESETS = [path.stem for path in sorted((ROOT / "presets").glob("*.yaml"))]
BASES = {
    "gpt2-sympy": "quickstart",
    "gpt2-owt-4b": "gpt2-sympy",
    "gpt2-medium": "gpt2-owt-4b",
    "gpt2-large": "gpt2-owt-4b",
    "gpt2-xl": "gpt2-owt-4b",
    "modern-owt-1b": "gpt2-owt-4b",
}


def values_of(preset: str) -> dict[str, str]:
    """The values as the file spells them."""
    return dict(re.findall(r"^(\w+): (.*?)\s+# ", (ROOT / f"presets/{preset}.yaml").read_text(), re.M))


@pytest.mark.parametrize("preset", BASES)
def test_a_preset_lists_the_keys_that_it_changes(preset):
    head = (ROOT / f"presets/{preset}.yaml").read_text().split("\n\n")[0].replace("\n# ", " ")
    base, keys = re.search(r"Changed from (\S+)\.yaml: ([\w, ]+)\.", head).groups()
    ours, others = read_page(ROOT / f"presets/{preset}.yaml"), read_page(ROOT / f"presets/{base}.yaml")
    assert base == BASES[preset]
    assert keys.split(", ") == [key for key in ours if ours[key] != others[key]]


def test_a_key_has_the_same_comment_everywhere():
    texts = [path.read_text() for path in (ROOT / "params.yaml", *(ROOT / "presets").glob("*.yaml"))]
    comments = [dict(re.findall(r"^(\w+): .*?\s+# (.*)$", text, re.M)) for text in texts]
    assert all(each == comments[0] for each in comments)
    assert set(comments[0]) == set(read_page())


def test_every_preset_is_compared_with_one():
    assert set(BASES) | {"quickstart"} == set(PRESETS)


def test_the_table_of_presets_has_the_values_of_the_files():
    rows = [line.strip("| ").split(" | ") for line in TEXTS["docs/parameters.md"].split("\n") if line.startswith("|")]
    names = next(row[1:] for row in rows if row[0] == "key")
    shown = {row[0].strip("`"): row[1:] for row in rows if len(row) == len(names) + 1 and row[0].startswith("`")}
    values = {name: values_of(name) for name in names}
    assert sorted(names) == PRESETS
    differing = {key for key in values["quickstart"] if len({values[name][key] for name in names}) > 1}
    assert set(shown) == differing
    for key, cells in shown.items():
        for name, cell in zip(names, cells, strict=True):
            value = values[name][key].replace("Skylion007", "…")
            assert cell == (f"{value[:7]}…" if len(value) == 40 else value), (key, name)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    """Those between the pages of docs/ are checked when the site is built."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXTS[page]):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("page", TEXTS)
def test_files_modules_and_commands_exist(page):
    text = TEXTS[page]
    for path in re.findall(r"`((?:encore|stages|tests|bench|presets|cloud|docs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path
    for module in re.findall(r"python -m ((?:bench|stages)[\w.]*\w)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
    for command in re.findall(r"(?:^|`|&& |= )encore (\w+)", text, re.M):
        assert command in COMMANDS or command in ("COMMAND", "NAME"), command
    for target in re.findall(r"\bmake (\w+)(?=`|  )", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


def test_the_package_on_the_public_index_is_never_named():
    """There `encore` is somebody else's."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pages = [ROOT / name for name in files if name.endswith((".md", ".py", ".yaml"))]
    wrong = re.compile(r"pip install ['\"]?" + r"encore")
    assert [path for path in pages if path.exists() and wrong.search(path.read_text())] == []


def test_the_readme_s_tree_is_the_repository_s():
    tree = TEXTS["README.md"].split("## The tree")[1]
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {name.split("/")[0] for name in files if "/" in name and not name.startswith(".")}
    assert folders == set(re.findall(r"^    (\w+)/ ", tree, re.M))
    assert all(preset in tree for preset in PRESETS)


def test_the_mixture_of_the_docs_is_a_page_that_passes() -> None:
    [block] = re.findall(r"```yaml\n(dataset:.*?)```", (ROOT / "docs/own-text.md").read_text(), re.S)
    page = YAML(typ="safe", pure=True).load(block)
    assert find_problems({**read_page(), **page}) == []
    assert split_cap(page["token_cap"], page["dataset_share"]) == {"code": 800_000_000, "web": 3_200_000_000}
