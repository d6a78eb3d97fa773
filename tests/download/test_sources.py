"""Sources: packages, the command and the published tokenizer; what arrives is the text that went in."""

import base64
import gzip
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import huggingface_hub
import pyarrow.parquet as pq
import pytest
import tiktoken.load

from encore import files
from encore.download import local_files, raw_folder, retries, sources
from encore.download.raw_folder import RawFolder
from encore.download.sources import current_revision, fetch, fetch_gpt2_ranks
from encore.errors import EncoreError
from encore.files import sha256_of
from encore.scratch import scratch_folder
from tests.conftest import ROOT
from tests.hub import ALWAYS, COMMIT, IMPATIENT, REPOSITORY, Fault, Hub, serving
from tests.text_sources import check_listed, fetch_all, parquet_bytes, sha256, texts_of, want

SECRET = "hf_SeCrEtToKeN"


# package:NAME


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a distribution `corpus` 1.2 of the given files, in a place of its own."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def install(files: dict[str, bytes], name: str = "corpus", more: str = "") -> Path:
        info = site / f"{name}-1.2.dist-info"
        info.mkdir(parents=True)
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n{more}")
        for path, content in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_bytes(content)
        hashes = {path: base64.urlsafe_b64encode(bytes.fromhex(sha256(text))) for path, text in files.items()}
        rows = [f"{path},sha256={hashes[path].decode().rstrip('=')},\n" for path in reversed(files)]
        info.joinpath("RECORD").write_text("".join(rows))
        return site

    return install


def test_package_is_its_modules_in_order(install, fetch_folder: Path) -> None:
    modules = {f"corpus/m{number:03d}.py": f"# {number} é\r\n".encode() for number in range(250)}
    others = {
        "corpus/__init__.py": b"",
        "corpus/data.txt": b"not a module",
        "corpus/stub.pyi": b"not one either",
        "../bin/script.py": b"#!/here/python\n",
        "a.py": b"first = 1\n",
    }
    install({**modules, **others})
    files = fetch_all("package:corpus", fetch_folder, column="code")
    expected = ["first = 1\n", *(content.decode() for content in modules.values())]
    assert texts_of(fetch_folder, files, "code") == expected
    check_listed(fetch_folder, files)
    parquet = pq.ParquetFile(fetch_folder / "00000-corpus.parquet")
    assert [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)] == [100, 100, 51]
    assert parquet.schema_arrow.names == ["code"]
    assert parquet.metadata.metadata is None  # neither pandas' nor Arrow's, which change with their versions
    assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"
    parquet.close()


@pytest.mark.parametrize(
    ("more", "licence"),
    [
        ("", None),
        ("License: BSD\n", "BSD"),
        ("License-Expression: MIT AND 0BSD\nLicense: another\n", "MIT AND 0BSD"),
        ("License: \n        The text of it\n        goes on\n", "The text of it"),
    ],
)
def test_the_licence_of_a_package(install, fetch_folder: Path, more: str, licence: str | None) -> None:
    install({"corpus/a.py": b"first = 1\n"}, more=more)
    assert fetch("package:corpus", "1.2", want(), fetch_folder, Path("scratch")).licence == licence


def test_package_has_the_same_bytes_twice(install, fetch_folder: Path, tmp_path: Path) -> None:
    install({f"corpus/{number}.py": os.urandom(500).hex().encode() for number in range(150)})
    again = tmp_path / "again"
    again.mkdir()
    assert fetch_all("package:corpus", fetch_folder) == fetch_all("package:corpus", again)


def test_package_is_taken_whole_whatever_is_wanted(install, fetch_folder: Path) -> None:
    install({f"corpus/{number}.py": b"x = 1\n" for number in range(300)})
    assert fetch_all("package:corpus", fetch_folder, wanted_text_bytes=1)[0].documents == 300


@pytest.mark.slow
def test_sympy_is_all_there(fetch_folder: Path) -> None:
    import sympy

    site = Path(sympy.__file__).parents[1]
    paths = [*site.glob("sympy/**/*.py"), site / "isympy.py"]
    expected = {str(PurePosixPath(path.relative_to(site))): path.read_bytes() for path in paths}
    files = fetch_all("package:sympy", fetch_folder)
    assert texts_of(fetch_folder, files) == [expected[name].decode() for name in sorted(expected) if expected[name]]
    assert current_revision("package:sympy") == sympy.__version__


def test_package_errors(install, fetch_folder: Path) -> None:
    with pytest.raises(EncoreError, match="package:no-such-thing is not installed; `pip install no-such-thing`"):
        current_revision("package:no-such-thing")
    site = install({"corpus/a.py": b"a = 1\n", "corpus/b.py": b"b = '\xff'\n"})
    with pytest.raises(EncoreError) as wrong:
        fetch("package:corpus", "1.3", want(), fetch_folder, Path("scratch"))
    assert "corpus 1.3 is wanted and 1.2 is installed" in str(wrong.value)
    assert "`pip install corpus==1.3`" in str(wrong.value)
    assert "set dataset_revision to 1.2" in str(wrong.value)
    with pytest.raises(EncoreError, match=r"package:corpus, corpus/b\.py is not UTF-8 \(byte 5\)"):
        fetch_all("package:corpus", fetch_folder)
    (site / "corpus/b.py").unlink()
    with pytest.raises(EncoreError, match=r"corpus/b\.py is missing; `pip install --force-reinstall corpus==1\.2`"):
        fetch_all("package:corpus", fetch_folder)
    install({"hollow/a.py": b""}, "hollow")
    with pytest.raises(EncoreError, match=r"package:hollow at 1\.2 holds no documents"):
        fetch_all("package:hollow", fetch_folder)


def test_a_module_that_is_not_the_installed_one(install, fetch_folder: Path) -> None:
    site = install({"corpus/a.py": b"a = 1\n", "corpus/b.py": b"b = 1\n"})
    assert texts_of(fetch_folder, fetch_all("package:corpus", fetch_folder)) == ["a = 1\n", "b = 1\n"]
    (site / "corpus/b.py").write_bytes(b"b = 2\n")
    with pytest.raises(EncoreError) as changed:
        fetch_all("package:corpus", fetch_folder)
    assert str(changed.value) == (
        "package:corpus, corpus/b.py is not the file that was installed (sha256 differs from RECORD); "
        "`pip install --force-reinstall corpus==1.2`"
    )
    record = site / "corpus-1.2.dist-info/RECORD"
    for row in ("corpus/a.py,,\n", "corpus/a.py,md5=abc,7\n"):
        record.write_text(row)
        with pytest.raises(EncoreError, match=r"corpus/a\.py has no hash in the package's RECORD.*--force-reinstall"):
            fetch_all("package:corpus", fetch_folder)
    digest = base64.urlsafe_b64encode(hashlib.sha512(b"a = 1\n").digest()).decode().rstrip("=")
    record.write_text(f"corpus/a.py,sha512={digest},7\n")
    fetch_all("package:corpus", fetch_folder)


def test_a_module_with_a_byte_order_mark(install, fetch_folder: Path) -> None:
    install({"corpus/a.py": b"\xef\xbb\xbfa = 1\n", "corpus/b.py": b"b = 1\n"})
    raw = fetch("package:corpus", "1.2", want(), fetch_folder, Path("s"))
    assert texts_of(fetch_folder, raw.files) == ["a = 1\n", "b = 1\n"]
    assert raw.repaired_documents == 1


# files:GLOB: order, and what the manifest is told


def lay(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        Path("corpus", name).parent.mkdir(parents=True, exist_ok=True)
        Path("corpus", name).write_bytes(content)


def fetch_corpus(folder: Path, **changes: object) -> RawFolder:
    for path in folder.iterdir():
        path.unlink()
    return fetch("files:corpus/**/*.*", current_revision("files:corpus/**/*.*"), want(**changes), folder, Path("s"))


def test_shuffled_files(fetch_folder: Path) -> None:
    """In the order of `printf SEED:NAME | b2sum -l 64`, which further files do not change."""
    names = ["a.txt", "b.parquet", "sub/c.jsonl", "d.txt", "e.txt.gz"]
    contents = [b"a", parquet_bytes(["b"]), b'{"text": "c"}\n', b"d", gzip.compress(b"e")]
    lay(dict(zip(names, contents, strict=True)))
    revision = current_revision("files:corpus/**/*.*")
    orders = {seed: fetch_corpus(fetch_folder, shard_order="shuffled", split_seed=seed).files for seed in (1, 3)}
    assert texts_of(fetch_folder, orders[3]) == ["c", "b", "e", "d", "a"]
    fetch_corpus(fetch_folder, shard_order="shuffled", split_seed=1)
    assert texts_of(fetch_folder, orders[1]) == ["d", "e", "a", "c", "b"]
    assert texts_of(fetch_folder, fetch_corpus(fetch_folder).files) == ["a", "b", "d", "e", "c"]
    lay({"f.txt": b"f"})
    more = texts_of(fetch_folder, fetch_corpus(fetch_folder, shard_order="shuffled", split_seed=3).files)
    assert [text for text in more if text != "f"] == ["c", "b", "e", "d", "a"]
    Path("corpus/f.txt").unlink()
    assert current_revision("files:corpus/**/*.*") == revision


def test_a_package_takes_no_notice_of_the_order(install, fetch_folder: Path) -> None:
    install({f"corpus/{number}.py": b"x = %d\n" % number for number in range(9)})
    for order in ("by_name", "shuffled"):
        raw = fetch("package:corpus", "1.2", want(shard_order=order), fetch_folder, Path("s"))
        assert texts_of(fetch_folder, raw.files) == [f"x = {number}\n" for number in range(9)]
        assert (raw.source_files, raw.whole_source, raw.repaired_documents) == (1, True, 0)
        assert [file.source for file in raw.files] == ["corpus"]
        assert raw.text_bytes == 9 * 6


def test_whole_source_and_where_files_come_from(fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_folder, "ROW_GROUP_BYTES", 14)
    rows = [f'{{"text": "{number:010d}"}}\n'.encode() for number in range(4)]
    lay({"a.jsonl": rows[0] + rows[1], "b/c.jsonl": rows[2] + rows[3]})
    parquet_text_bytes = fetch_corpus(fetch_folder).text_bytes
    assert parquet_text_bytes == 40
    lay({"d.parquet": parquet_bytes(["p"])})

    def told(text_bytes: int) -> tuple:
        raw = fetch_corpus(fetch_folder, text_bytes=text_bytes)
        assert raw.source_files == 3
        return sum(file.documents for file in raw.files), raw.whole_source, [file.source for file in raw.files]

    assert told(10**12) == (5, True, ["a.jsonl", "d.parquet"])
    assert told(41) == (5, True, ["a.jsonl", "d.parquet"])
    assert told(40) == (4, False, ["a.jsonl"])
    assert told(30) == (3, False, ["a.jsonl"])
    Path("corpus/d.parquet").rename("corpus/a.parquet")
    assert told(10**12) == (5, True, ["a.jsonl", "a.parquet", "b/c.jsonl"])
    parquet_bytes_of_text = fetch_corpus(fetch_folder).text_bytes - 40
    assert told(parquet_bytes_of_text + 40) == (5, True, ["a.jsonl", "a.parquet", "b/c.jsonl"])
    assert told(parquet_bytes_of_text + 30) == (4, False, ["a.jsonl", "a.parquet", "b/c.jsonl"])


def test_room_for_files(fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet is copied; text becomes no larger than it is or is wanted; nobody knows how large compressed text is."""
    parquet = parquet_bytes(["p" * 1_000])
    lay({"a.txt": b"a" * 50_000, "b.txt.gz": gzip.compress(b"b" * 10_000), "c.parquet": parquet, "d.parquet": parquet})
    free = 0
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))

    def needs(count: int, text_bytes: int) -> None:
        nonlocal free
        free = count - 1
        with pytest.raises(EncoreError, match="are free on its disk; make room or lower token_cap"):
            fetch_corpus(fetch_folder, text_bytes=text_bytes)
        assert list(fetch_folder.iterdir()) == []
        free = count
        fetch_corpus(fetch_folder, text_bytes=text_bytes)

    needs(50_000 + 2 * len(parquet), 10**12)
    needs(50_000 + len(parquet), 51_000)
    needs(700, 700)


def test_copies_of_parquet_are_not_hashed_again(fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay({"a.parquet": parquet_bytes(["a"]), "b.parquet": parquet_bytes(["b"])})
    revision = current_revision("files:corpus/**/*.*")
    hashed: list[Path] = []
    monkeypatch.setattr(local_files, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    monkeypatch.setattr(raw_folder, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    files = fetch("files:corpus/**/*.*", revision, want(), fetch_folder, Path("s")).files
    check_listed(fetch_folder, files)
    assert sorted(hashed) == [Path("corpus/a.parquet"), Path("corpus/b.parquet")]


# the command


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", IMPATIENT, "encore", "sources", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "*", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_command_prints_the_revision(fetch_folder: Path) -> None:
    Path("a.txt").write_bytes(b"a")
    result = run_command("files:*.txt")
    assert result.stdout == sha256(f"{sha256(b'a')}  a.txt\n".encode()) + "\n"
    assert (result.returncode, result.stderr) == (0, "")
    usage = run_command("sympy")
    assert (usage.returncode, usage.stdout) == (1, "")
    assert usage.stderr.startswith("encore: sympy is no data set; name hf:OWNER/NAME, ")
    assert run_command("files:a.txt", "files:b.txt").returncode == 2


@pytest.mark.slow
def test_command_uses_hf_endpoint_and_never_prints_the_token(fetch_folder: Path) -> None:
    with serving({"train.parquet": parquet_bytes(["a"])}) as server:
        server.token = SECRET
        good = run_command(f"hf:{REPOSITORY}", HF_ENDPOINT=server.url, HF_TOKEN=SECRET)
        assert (good.stdout, good.stderr) == (f"{COMMIT}\n", "")
        server.token = "another"
        refused = run_command(f"hf:{REPOSITORY}", HF_ENDPOINT=server.url, HF_TOKEN=SECRET)
    gone = run_command(f"hf:{REPOSITORY}", HF_ENDPOINT=server.url, HF_TOKEN=SECRET)
    for bad, words in ((refused, "refuses it (401)"), (gone, "connection to the Hub fails")):
        assert bad.returncode == 1
        assert words in bad.stderr
        assert SECRET not in bad.stdout + bad.stderr
        assert "Traceback" not in bad.stderr


def test_import_is_light() -> None:
    code = "import sys, encore.download.sources; print({'huggingface_hub', 'tiktoken'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


# the published tokenizer, the scratch folder


def test_real_gpt2_ranks(tmp_path: Path) -> None:
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with the published GPT-2 ranks")
    lines = fetch_gpt2_ranks(tmp_path, tmp_path / "scratch").read_bytes().splitlines()
    assert len(lines) == 50_256
    assert base64.b64decode(lines[262].split()[0]) == b" the"
    assert [path.name for path in tmp_path.iterdir()] == ["r50k_base.tiktoken"]


RANKS = b"IQ== 0\nIg== 1\n"
RANKS_PATH = "/encodings/r50k_base.tiktoken"


@pytest.fixture
def ranks_server(fetch_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that has ranks which are taken for the published ones."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(sources, "GPT2_RANKS_SHA256", sha256(RANKS))
    monkeypatch.setattr(retries, "LONGEST_WAIT_SECONDS", 0.01)
    with serving({}) as server:
        server.other_files[RANKS_PATH] = RANKS
        monkeypatch.setattr(sources, "GPT2_RANKS_URL", server.url + RANKS_PATH)
        yield server
    huggingface_hub.close_session()


def fetch_ranks(folder: Path) -> bytes:
    return fetch_gpt2_ranks(folder, Path("scratch")).read_bytes()


def test_gpt2_ranks_are_fetched_once(ranks_server: Hub, fetch_folder: Path) -> None:
    assert [fetch_ranks(fetch_folder), fetch_ranks(fetch_folder)] == [RANKS, RANKS]
    assert ranks_server.bytes_served == {RANKS_PATH: len(RANKS)}
    assert ranks_server.authorizations == {None}  # the Hub's token is not this server's business
    Path("scratch/gpt2/r50k_base.tiktoken").write_bytes(b"damaged")
    assert fetch_ranks(fetch_folder) == RANKS
    assert ranks_server.bytes_served == {RANKS_PATH: 2 * len(RANKS)}


def test_gpt2_ranks_come_from_where_tiktoken_keeps_them(
    ranks_server: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: RANKS)
    tiktoken.load.read_file_cached(sources.GPT2_RANKS_URL, sha256(RANKS))
    assert fetch_ranks(fetch_folder) == RANKS
    assert not ranks_server.bytes_served
    (kept,) = Path(os.environ["TIKTOKEN_CACHE_DIR"]).iterdir()
    kept.write_bytes(b"damaged")
    assert fetch_ranks(fetch_folder) == RANKS
    assert ranks_server.bytes_served == {RANKS_PATH: len(RANKS)}


def test_gpt2_ranks_in_trouble(ranks_server: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_server.faults[RANKS_PATH] = [Fault("damage", 2)]
    with pytest.raises(EncoreError, match=r"r50k_base\.tiktoken: what arrives is not the published file .*run again"):
        fetch_ranks(fetch_folder)
    assert not Path("scratch").exists()
    passing = [Fault("damage"), Fault("status", status=503), Fault("reset", after_bytes=3)]
    ranks_server.faults[RANKS_PATH] = passing
    assert fetch_ranks(fetch_folder) == RANKS
    Path("scratch/gpt2/r50k_base.tiktoken").unlink()
    ranks_server.faults[RANKS_PATH] = [Fault("status", ALWAYS, 403)]
    with pytest.raises(EncoreError, match=r"cannot be downloaded \(status 403\).*set TIKTOKEN_CACHE_DIR to a folder"):
        fetch_ranks(fetch_folder)


def test_gpt2_ranks_without_network(ranks_server: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "GPT2_RANKS_URL", "https://127.0.0.2/ranks")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("NO_PROXY")
    huggingface_hub.close_session()
    with pytest.raises(EncoreError, match=r"the gpt2 tokenizer, cannot be downloaded \(ConnectError\).*run again, or"):
        fetch_ranks(fetch_folder)


def test_scratch_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ENCORE_SCRATCH", raising=False)
    assert scratch_folder() == Path(".encore")
    monkeypatch.setenv("ENCORE_SCRATCH", "")
    assert scratch_folder() == Path(".encore")
    monkeypatch.setenv("ENCORE_SCRATCH", str(tmp_path))
    assert scratch_folder() == tmp_path
