"""`make report`: one page about a run, or about several side by side, that opens with no network.

The numbers are those of metrics/, params.yaml and dvc.lock; nothing is computed again.
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from encore.files import write_whole
from encore.json_files import flatten
from encore.progress import as_duration
from encore.report import pipeline_graph, tables
from encore.report.figures import datasets, figures
from encore.report.results import Results, load_results, read_yaml
from encore.report.revisions import WORKSPACE, Revision, find_revision
from encore.report.summary import summary_rows
from encore.report.vega import vega_script
from encore.schemas import Pipeline

PAGE = Path("report.html")
TEMPLATE = "report_template.html"
# Where one of these differs, a token is not the same thing in all runs, or the held-out text is another.
TEXT_KEYS = {
    *("dataset", "dataset_revision", "dataset_share", "text_column"),
    *("tokenizer", "vocab_size", "val_fraction", "split_seed"),
}


def main() -> None:
    arguments = parse_arguments()
    revisions = [find_revision(name) for name in dict.fromkeys(arguments.experiments or [WORKSPACE])]
    write_whole(arguments.out, render(revisions).encode())
    print(f"Report: {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("encore report", description="Writes a page about one or several runs.")
    what = f"names of `dvc exp`, or git's for a commit; {WORKSPACE}, the default, is the working tree"
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=what)
    parser.add_argument("--out", type=Path, default=PAGE, metavar="PATH", help=f"default: {PAGE}")
    return parser.parse_args()


def render(revisions: list[Revision]) -> str:
    """The page, as HTML. Raises EncoreError where a run has not ended."""
    runs = [load_results(revision) for revision in revisions]
    drawn = figures(runs)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # samples are text that a model wrote
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(text=tables.as_text, yaml=tables.as_yaml, duration=as_duration)
    environment.globals.update(difference=tables.difference)
    return environment.get_template(TEMPLATE).render(
        vega=vega_script(),
        runs=runs,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        summaries=[dict(summary_rows(run.run, run.evaluation)) for run in runs],
        figures=drawn,
        datasets=datasets(runs),
        provenance=[tables.provenance(*pair) for pair in zip(runs, revisions, strict=True)],
        **(about_one(runs[0], revisions[0]) if len(runs) == 1 else about_several(runs, revisions)),
    )


def about_one(run: Results, revision: Revision) -> dict[str, Any]:
    """What the page of a single run has more. The history knows of the working tree only."""
    stages = []
    if revision.commit is None:
        stages = pipeline_graph.read_stages(
            read_yaml(revision, "dvc.yaml", Pipeline)["stages"], pipeline_graph.read_history()
        )
    params = {param.key: param.value for param in run.params}
    return {
        "title": tables.title(params),
        "evaluation": flatten(run.metrics["metrics/eval.json"], "."),
        "tokens": flatten(run.tokens, "."),
        "stages": stages,
        "graph": pipeline_graph.draw(stages) if stages else None,
    }


def about_several(runs: list[Results], revisions: list[Revision]) -> dict[str, Any]:
    """What differs."""
    params = tables.differing_params(runs)
    return {
        "params": params,
        "summary_differences": tables.summary_differences(runs),
        "other_text": not TEXT_KEYS.isdisjoint(key for key, _ in params),
        "metrics": tables.metric_rows(runs),
        "code": tables.differing_code(runs, revisions),
    }
