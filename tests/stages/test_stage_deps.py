"""dvc.yaml's deps and params, and the code in data/code, against what the stages really import and read.

Each stage runs in a folder that holds the data and the modules listed for it and nothing else of the repository. What
it lacks makes it fail; what it does not use shows in the list of modules it has loaded, or in a run without it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from encore.code import SILENT, describe_code, path_of
from encore.pretrained.initial_weights import fetch_initial
from stages import check
from tests.conftest import MODERN, ROOT, pipeline_environment, read_page, write_page
from tests.forks import fast_starts

pytestmark = pytest.mark.slow

STAGES = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
# The weights that training starts from: it reads them unless it starts from scratch, as the default page has it.
UNLESS_SCRATCH = {("train", "data/init")}
# What transformers computes a nanochat-plus by: copied into the model's folder, and loaded by lm-eval's process alone.
MODELING = "encore/pretrained/modeling_nanochat_plus.py"
UNLESS_PLUS = {("train", MODELING)}
ROOMS = {path.relative_to(ROOT).as_posix() for path in (ROOT / "encore").rglob("__init__.py")}  # nothing but docstrings
SAID = {path_of(name).relative_to(ROOT).as_posix() for name in SILENT}  # loaded, and left out of data/code
# Runs a stage and prints which of the folder's modules were loaded and which keys of params.yaml were read.
RUN_AND_REPORT = """
import json, runpy, sys
from pathlib import Path
from encore.params import StageParams
read, look_up = set(), StageParams.__getattr__
def note(self, key):
    value = look_up(self, key)
    read.add(key)
    return value
StageParams.__getattr__ = note
whole = StageParams.as_dict
def note_all(self):
    read.update(self._values)
    return whole(self)
StageParams.as_dict = note_all
# An editable installation finds in the repository what the folder lacks.
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
name = sys.argv.pop(1)
runpy.run_module("stages." + name, run_name="__main__", alter_sys=True)
files = {getattr(module, "__file__", None) for module in list(sys.modules.values())} - {None}
here = Path.cwd()
local = [Path(file).relative_to(here).as_posix() for file in files if Path(file).is_relative_to(here)]
Path("report.json").write_text(json.dumps({"modules": sorted([*local, f"stages/{name}.py"]), "keys": sorted(read)}))
"""


def code_of(stage: str) -> set[str]:
    """The paths of the modules whose hashes make the stage run again."""
    return {line.split()[1] for line in describe_code(f"stages.{stage}").splitlines()}


def data_of(stage: str) -> list[str]:
    """The data that a stage lists. Its code is compared only where dvc runs it."""
    return [dep for dep in STAGES[stage]["deps"] if stage != "check" and not dep.startswith("data/code/")]


def sandbox(repository: Path, stage: str, folder: Path) -> Path:
    """A folder with the data and the modules that are listed for a stage, those that only talk, and the two pages."""
    for name in {*data_of(stage), "dvc.yaml", "params.yaml", *code_of(stage), *SAID, *ROOMS}:
        source, target = repository / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    return folder


def run_stage(folder: Path, stage: str) -> subprocess.CompletedProcess:
    command, environment = [sys.executable, "-c", RUN_AND_REPORT, stage], pipeline_environment(ENCORE_WORKERS="1")
    with fast_starts():
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "check"])
def test_a_stage_uses_what_it_lists_and_nothing_else(finished, stage, tmp_path):
    folder = sandbox(finished, stage, tmp_path / "sandbox")
    done = run_stage(folder, stage)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / "report.json").read_text())
    assert set(report["modules"]) - SAID - ROOMS == code_of(stage) - ROOMS - {MODELING}
    assert set(report["keys"]) == set(STAGES[stage]["params"])


def test_every_stage_depends_on_its_code() -> None:
    assert STAGES["check"]["deps"] == ["encore", "stages"]
    assert ["check", *check.STAGES] == list(STAGES)
    for stage in check.STAGES:
        assert STAGES[stage]["deps"][0] == f"data/code/{stage}.txt"


ALWAYS_READ = [
    (stage, dep) for stage in STAGES for dep in data_of(stage) if (stage, dep) not in UNLESS_SCRATCH | UNLESS_PLUS
]


@pytest.mark.parametrize(("stage", "dep"), ALWAYS_READ)
def test_every_data_dep_is_needed(finished, stage, dep, tmp_path):
    folder = sandbox(finished, stage, tmp_path / "sandbox")
    shutil.rmtree(folder / dep)
    done = run_stage(folder, stage)
    assert done.returncode == 1
    assert re.match(rf"encore: {dep}/\S+ is missing; `dvc repro", done.stderr), done.stderr


@pytest.mark.parametrize(("stage", "dep"), UNLESS_SCRATCH)
def test_initial_weights_are_needed_unless_training_starts_from_scratch(finished, stage, dep, tmp_path):
    folder = sandbox(finished, stage, tmp_path / "sandbox")
    shutil.rmtree(folder / dep)
    assert run_stage(folder, stage).returncode == 0

    page = folder / "params.yaml"
    write_page(page, **{**read_page(page), "init_from": "./somefolder/"})
    done = run_stage(folder, stage)
    assert done.returncode == 1
    assert re.match(rf"encore: {dep}/\S+ is missing; `dvc repro", done.stderr), done.stderr
    shutil.copytree(finished / "model", tmp_path / "weights")
    (folder / dep).mkdir()
    fetch_initial(f"{tmp_path}/weights", folder / dep, tmp_path)
    done = run_stage(folder, stage)
    assert done.returncode == 0, done.stdout + done.stderr


def test_training_of_nanochat_plus_needs_the_module_that_it_copies(finished, tmp_path):
    folder = sandbox(finished, "train", tmp_path / "sandbox")
    page = folder / "params.yaml"
    write_page(page, **{**read_page(page), **MODERN, "architecture": "nanochat-plus"})
    assert run_stage(folder, "train").returncode == 0
    assert (folder / "model" / Path(MODELING).name).read_bytes() == (ROOT / MODELING).read_bytes()
    shutil.rmtree(folder / "model")
    (folder / MODELING).unlink()
    assert MODELING in run_stage(folder, "train").stderr


def test_an_edit_of_it_runs_the_evaluation_again():
    assert MODELING in code_of("evaluate")
    assert MODELING not in code_of("train")  # which lists the file itself


def test_no_shell_hides_the_death_of_dvc():
    """A stage asks to be told when its parent dies, so its parent must be dvc."""
    for stage, entry in STAGES.items():
        assert entry["cmd"] == f"exec python -m stages.{stage}"


# Stands for whatever heavy package a stage imports first: prints the signal that comes with the parent's death.
HEAVY = """
import ctypes, os
number = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
os.write(1, b"told by %d" % number.value)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_asks_to_be_told_before_it_imports_anything_heavy(stage, tmp_path):
    for name in ("numpy", "psutil", "pyarrow", "pydantic", "safetensors", "tiktoken", "torch"):
        (tmp_path / f"{name}.py").write_text(HEAVY)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    command = [sys.executable, *STAGES[stage]["cmd"].split()[2:]]
    done = subprocess.run(command, cwd=tmp_path, env=pipeline_environment(PYTHONPATH=path), capture_output=True)
    assert done.stdout == b"told by 15", done.stderr.decode()


def test_package_files_hold_only_docstrings():
    for name in ROOMS - {"encore/__init__.py"}:  # which is the door of the library, and used by no stage
        assert re.fullmatch(r'"""[^"]*"""\n', (ROOT / name).read_text())


def test_outputs_are_what_the_design_says():
    """No persist, and no plain out without cache: either would switch DVC's run cache off for the stage."""
    for stage in STAGES.values():
        assert all(isinstance(out, str) for out in stage.get("outs", []))
        for out in [*stage.get("metrics", []), *stage.get("plots", [])]:
            (options,) = out.values()
            assert options["cache"] is False
            assert "persist" not in options
