"""What many tests need: a page of parameters, a folder of tokens, and a whole copy of the repository to run DVC in."""

import os

# Two workers share two cores: torch's threads would wait for each other, in models this small far longer than they
# compute. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from ruamel.yaml import YAML

from encore.files import write_whole
from encore.params import StageParams
from encore.tokens.ranks import write_ranks
from encore.tokens.token_files import RANKS_FILE, SPLITS, ShardWriter, shards_as_json, token_dtype, write_manifest
from tests.forks import fast_starts
from tests.token_folders import about

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "presets" / "gpt2-sympy.yaml"  # what tests change a few values of


SLOW_FOLDERS = ("bench", "pipeline")


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a program leaves in the folder for temporary files because a test has killed it, pytest removes with its
    own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("t")))
        patch.setattr(tempfile, "tempdir", None)  # found anew
        yield


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores, since some tests wait for dvc's queue, for servers and for clocks."""
    return (os.cpu_count() or 1) + 1


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make quick` does not read files whose tests are all slow: what they import takes seconds."""
    if config.option.markexpr != "not slow":
        return None
    if collection_path.suffix != ".py":
        return collection_path.name in SLOW_FOLDERS or None
    return bool(re.search(r"^pytestmark = .*\bmark\.slow\b", collection_path.read_text(), re.M)) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of whole pipelines are slow. Slow ones come first, and the compiler's before all, so that no worker is left
    alone with one."""
    for item in items:
        if {"finished", "compared"} & set(item.fixturenames) or item.path.parent.name in SLOW_FOLDERS:
            item.add_marker("slow")
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, "compiler" not in item.fixturenames))


@pytest.fixture(autouse=True)
def _no_leaking_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see neither the developer's wandb and scratch settings nor each other's."""
    for name in filter(_is_setting, list(os.environ)):
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_leaking_determinism() -> Iterator[None]:
    """What a stage sets up is torch's for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def _is_setting(name: str) -> bool:
    return name.startswith(("ENCORE_", "WANDB_", "DVC_", "HF_"))


def read_page(path: Path = PAGE) -> dict[str, Any]:
    """A page of parameters as plain values."""
    return YAML(typ="safe", pure=True).load(path.read_text())


def write_page(path: Path, **changes: Any) -> None:
    """PAGE with some values changed."""
    with path.open("w") as file:
        YAML().dump({**read_page(), **changes}, file)


TINY = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_iters": 6,
    "warmup_iters": 2,
    "log_interval": 1,
    "eval_interval": 3,
    "eval_iters": 2,
    "checkpoint_interval": 2,
    "max_new_tokens": 8,
}

# nanochat's model trained by Muon, with what suits a few steps of a tiny one.
MODERN = {
    "architecture": "nanochat",
    "optimizer": "muon",
    "learning_rate": 0.02,
    "embedding_lr": 0.3,
    "head_lr": 0.1,
    "lr_schedule": "trapezoid",
    "warmdown_ratio": 0.6,
    "min_lr": 0.0,
    "weight_decay": 2.0,
    "beta1": 0.8,
}


@pytest.fixture
def forking() -> Iterator[None]:
    """Python programs that the test starts have torch imported at once (tests/forks.py)."""
    with fast_starts():
        yield


@pytest.fixture
def tiny_params() -> Callable[..., StageParams]:
    """Makes the train stage's parameters for a model that takes milliseconds a step."""
    return lambda **changes: StageParams("train", {**read_page(), **TINY, **changes})


def write_tokens(folder: Path, train: np.ndarray, val: np.ndarray, vocab_size: int, shard_tokens: int = 1000) -> None:
    """A token folder as the tokenize stage leaves it; each split is one document that ends with its last token."""
    folder.mkdir(parents=True)
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"%03d?" % number: 256 + number for number in range(vocab_size - 257)}
    write_whole(folder / RANKS_FILE, write_ranks(ranks))
    dtype = token_dtype(vocab_size)
    shards = {}
    for split, tokens in zip(SPLITS, (train, val), strict=True):
        writer = ShardWriter(folder, split, dtype, shard_tokens)
        writer.add(tokens.astype(dtype), np.array([len(tokens)]), np.array([3 * len(tokens)]))
        shards[split] = writer.finish()
    entries = {split: shards_as_json(of_split) for split, of_split in shards.items()}
    write_manifest(folder, vocab_size, shards, about(entries, token_cap=len(train), whole_source=True))


@pytest.fixture
def tokens_folder(tmp_path: Path) -> Path:
    """Tokens that can be learned a little: a noisy walk over 300 ids, 5,000 for training and 700 held out."""
    random = np.random.default_rng(0)
    walk = np.cumsum(random.integers(0, 4, 5700)) % 299
    walk[[4999, 5699]] = 299  # end-of-text
    folder = tmp_path / "data" / "tokens"
    write_tokens(folder, walk[:5000], walk[5000:], vocab_size=300)
    return folder


@pytest.fixture
def short_documents(tmp_path: Path) -> Path:
    """The same walk in documents of 23 tokens and their end-of-text."""
    walk = np.cumsum(np.random.default_rng(0).integers(0, 4, 5760)) % 299
    walk[23::24] = 299
    folder = tmp_path / "data" / "tokens"
    write_tokens(folder, walk[:5040], walk[5040:], vocab_size=300)
    return folder


@pytest.fixture
def fetch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to fetch into; the working directory is beside it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    target = tmp_path / "raw"
    target.mkdir()
    return target


@pytest.fixture
def compiler(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """torch.compile as it writes nothing outside the tests' folders. Its headers are compiled once for all tests, and
    no programs that ask what the compiler knows of this CPU."""
    from torch._inductor import codecache, config

    headers = tmp_path_factory.getbasetemp() / "headers"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(codecache, "_HEADER_DIR", str(headers))
    monkeypatch.setattr(codecache, "_HEADER_LOCK_DIR", str(headers / "locks"))
    with config.patch({"cpp.vec_isa_ok": True}):
        yield


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile up to the traces of both passes, which then run as they are: all but the making of kernels, which
    takes a minute for a model. tests/training/test_compiled.py makes those."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


def copy_repository(target: Path) -> Path:
    """A fresh repository with the files that git has or would take here, committed, and no DVC cache."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for command in (["init", "-q"], ["config", "user.name", "test"], ["config", "user.email", "test@localhost"]):
        subprocess.run(["git", *command], cwd=target, check=True)
    commit(target, "clone")
    return target


def commit(repository: Path, message: str) -> None:
    """Commits all that git does not ignore."""
    subprocess.run(["git", "add", "-A"], cwd=repository, check=True)
    subprocess.run(["git", "commit", "-qm", message], cwd=repository, check=True)


def pipeline_environment(**more: str) -> dict[str, str]:
    """The environment of an activated .venv: `python` in dvc.yaml's commands is the one that runs the tests.

    One thread, since threads only wait for each other in models as small as these.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if not _is_setting(name)}
    return {**inherited, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def run_dvc(repository: Path, *arguments: str, exit_code: int = 0, **environment: str) -> str:
    """Runs dvc and returns what it printed; any other exit code than the expected fails the test with that text."""
    command, pipe = [sys.executable, "-m", "dvc", *arguments], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with fast_starts():
        done = subprocess.run(command, cwd=repository, env=pipeline_environment(**environment), text=True, **pipe)
    assert done.returncode == exit_code, done.stdout
    return done.stdout


# A tenth of sympy's text, and a context into which a row of a standard task fits.
SMALL = {
    **TINY,
    "dataset": "package:mpmath",
    "dataset_revision": version("mpmath"),
    "token_cap": 300_000,
    "val_fraction": 0.1,
    "block_size": 64,
    "max_iters": 12,
    "log_interval": 2,
    "eval_interval": 4,
    "checkpoint_interval": 4,
    "num_samples": 1,
}


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` fills: once for all workers, and the others wait."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            make(partial := folder.with_suffix(".partial"))
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_once(tmp_path_factory, "finished", run_small_pipeline)


def run_small_pipeline(target: Path) -> None:
    """The whole pipeline on a small text, with a small model."""
    repository = copy_repository(target)
    (repository / "dvc.lock").unlink()  # it would spare the stages whose results are in git
    write_page(repository / "params.yaml", **SMALL)
    commit(repository, "a small page")
    (repository / "output.txt").write_text(run_dvc(repository, "repro"))
    commit(repository, "results")


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """A copy of a repository in which the whole pipeline has run, with a small text and a small model."""
    return Path(shutil.copytree(_finished, tmp_path / "repository", symlinks=True))


@pytest.fixture(scope="session")
def _compared(_finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def run_longer(target: Path) -> None:
        shutil.copytree(_finished, target, symlinks=True)
        output = run_dvc(target, "exp", "run", "-S", "max_iters=14", "-n", "longer")
        (target / ".dvc" / "tmp" / "longer.txt").write_text(output)
        subprocess.run(["git", "checkout", "-q", "HEAD", "."], cwd=target, check=True)
        run_dvc(target, "checkout")

    return make_once(tmp_path_factory, "compared", run_longer)


@pytest.fixture
def compared(_compared: Path, tmp_path: Path) -> Path:
    """A copy of a repository with the experiment `longer`, of 14 iterations where HEAD has 12; .dvc/tmp/longer.txt has
    what dvc printed while it ran."""
    return Path(shutil.copytree(_compared, tmp_path / "repository", symlinks=True))
