"""What a report says in tables: numbers as text, what differs between runs, and where each came from."""

import json
import re
from typing import Any

from encore.code import FOLDER
from encore.errors import bring_back
from encore.json_files import flatten
from encore.pretrained.init_from import parse_record
from encore.report.results import Results, check_lock, hash_of
from encore.report.revisions import Revision, describe_commit
from encore.report.summary import describe_peak, summary_numbers


def as_yaml(value: Any) -> str:
    """A parameter, as params.yaml has it."""
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:_}"
    return value if isinstance(value, str) else json.dumps(value)


def as_text(value: Any) -> str:
    """A metric: numbers with 5 digits and commas; a dash for what cannot be computed, as the error of one document."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:,.5g}"
    return str(value)


def difference(value: Any, first: Any) -> str:
    """How much larger a number is than that of the first run; nothing where that says nothing."""
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (value, first))
    if not numbers or value == first:
        return ""
    more = value - first
    return f"{more:+,}" if isinstance(more, int) else f"{more:+,.0f}" if abs(more) >= 1e4 else f"{more:+,.4g}"


def differing_params(runs: list[Results]) -> list[tuple[str, list[Any]]]:
    """The keys of params.yaml that have not the same value in all runs, and those values; None where a run has none."""
    pages = [{param.key: param.value for param in run.params} for run in runs]
    keys = dict.fromkeys(key for page in pages for key in page)
    rows = [(key, [page.get(key) for page in pages]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def summary_differences(runs: list[Results]) -> list[dict[str, str]]:
    """For each run, by how much the numbers of its summary differ from those of the first."""
    summaries = [summary_numbers(run.run, run.evaluation) for run in runs]
    return [
        {
            name: format(value - summaries[0][name][0], f"+{form}")
            for name, (value, form) in summary.items()
            if name in summaries[0] and value != summaries[0][name][0]
        }
        for summary in summaries
    ]


def metric_rows(runs: list[Results]) -> list[tuple[str, list[Any]]]:
    """Every metric by its name, with a value for each run."""
    flat = [{key: value for file in run.metrics.values() for key, value in flatten(file, ".").items()} for run in runs]
    return [(key, [metrics.get(key) for metrics in flat]) for key in dict.fromkeys(key for one in flat for key in one)]


def differing_code(runs: list[Results], revisions: list[Revision]) -> list[str]:
    """The modules that are not the same in all runs; the list of a stage's modules where it is in nobody's cache."""
    lists = [
        {dep["path"]: dep["md5"] for stage in run.lock.values() for dep in stage["deps"] if _lists_code(dep["path"])}
        for run in runs
    ]
    modules: set[str] = set()
    for path in set().union(*lists):
        if len({one.get(path) for one in lists}) > 1:
            texts = [revision.read_output(path) for revision in revisions]
            lines = [set(text.decode().splitlines()) for text in texts if text is not None]
            if len(lines) < len(runs):
                modules.add(path)
            else:
                differing = set[str]().union(*lines) - lines[0].intersection(*lines)
                modules |= {line.split()[1] for line in differing}
    return sorted(modules)


def _lists_code(path: str) -> bool:
    return path.startswith(f"{FOLDER}/")


def describe_data(params: dict[str, Any]) -> str:
    """What `dataset` and its company say, of each source."""
    dataset, revision = params["dataset"], params["dataset_revision"]
    if not isinstance(dataset, dict):
        return f"{dataset} at {revision}"
    shares = params["dataset_share"]
    return "; ".join(f"{100 * shares[name]:.4g} % {dataset[name]} at {revision[name]}" for name in sorted(dataset))


def title(params: dict[str, Any]) -> str:
    """The data in a few words: a single source, or the names of several with their shares in percent."""
    shares = params.get("dataset_share")
    if not shares:
        return describe_data(params)
    return " + ".join(f"{100 * shares[name]:.4g} % {name}" for name in sorted(shares))


def provenance(run: Results, revision: Revision) -> dict[str, str]:
    """Where a run came from, a fact by its name. What neither the cache nor a remote has is left out."""
    params = {param.key: param.value for param in run.params}
    log, record = revision.read_output("training.log"), revision.read_output("model/encore.json")
    facts = {
        "data": describe_data(params),
        **{
            f"{path} (md5 in dvc.lock)": md5
            for path in ("data/raw", "data/tokens", "model")
            if (md5 := hash_of(run.lock, path))
        },
        "device": f"{run.run['devices']} x {run.run['device']}",
        **({"peak": describe_peak(run.run)} if "mfu" in run.run else {}),
        "commit": describe_commit(revision),
    }
    log_text = check_lock(log, "training.log", run.lock).decode() if log else ""
    if found := re.search(r", commit (\S+)$", log_text, re.M):
        facts["commit that training began on"] = found[1]
    if record:
        trained = parse_record(record, "model/encore.json", bring_back("model", "train"))
        facts["versions"] = ", ".join(f"{name} {number}" for name, number in trained["versions"].items())
        facts["manifest of data/tokens (sha256)"] = trained["data_sha256"]
        codes = [f"{code['sha256']} from iteration {code['from_iter']}" for code in trained["code"]]
        facts["code that trained (sha256)"] = "; ".join(codes)
    return facts
