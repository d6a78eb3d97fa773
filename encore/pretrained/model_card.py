"""README.md of model/: what the model is, in the form that the Hugging Face Hub shows as a model card.

It holds nothing that a clock says, nor the commit: the same run writes the same bytes, whenever and from wherever.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from encore.files import write_whole
from encore.pretrained.markup import as_markdown, as_markdown_code
from encore.pretrained.nanochat_hub import MODELING, PLUS

CARD = "README.md"
NO_LICENCE = "not named by the source: look there before you publish"
TITLES = {
    "gpt2": "A GPT-2",
    "nanochat": "A nanochat model",
    "nanochat-plus": "A nanochat-plus model",
}
USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
prompt = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50, do_sample=True)[0]))
"""
USE_PLUS = USE.replace('("model")', '("model", trust_remote_code=True)')
TRUST = [
    f"transformers has no nanochat-plus. It computes the model by `{MODELING.name}`, which comes with",
    "this folder, and runs that only with `trust_remote_code=True`.",
    "",
]
MADE = [
    "`dvc repro` in the commit whose dvc.lock names this folder's hash (`git log -S HASH -- dvc.lock`), with these",
    "parameters; encore.json has them too, and the hashes of data and code.",
]
MADE_BEST = [
    "`dvc repro` with these parameters. ENCORE_BEST_MODEL kept the model with the lowest val loss of the run, at the",
    "iteration named above. encore.json has the parameters too, and the hashes of data and code.",
]
# Of the names that the Hub knows, those that text usually has. It refuses any other.
HUB_LICENCES = {
    *("afl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc", "cc0-1.0"),
    *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0"),
    *("cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0"),
    *("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "isc", "lgpl", "lgpl-2.1"),
    *("lgpl-3.0", "mit", "mpl-2.0", "odbl", "odc-by", "pddl", "unlicense", "wtfpl", "zlib"),
}


def describe_for_hub(record: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """What the Hub lists and searches models by, of what `write_card` gets.

    The licence is the data's, where that has one for all its sources and it is one of the Hub's names. The language of
    the data is not known.
    """
    sources, architecture = record["data"]["sources"], record["params"]["architecture"]
    repositories = list(filter(None, map(hub_repository, sources)))
    licences = {(source["licence"] or "").lower() for source in sources}
    licence = licences.pop() if len(licences) == 1 else None
    whole = " + ".join(source["dataset"] for source in sources)
    result = {
        "task": {"type": "text-generation"},
        "dataset": {
            "type": repositories[0] if len(sources) == len(repositories) == 1 else whole,
            "name": whole,
            "split": "val",
            "revision": " + ".join(source["dataset_revision"] for source in sources),
        },
        "metrics": [
            {
                "type": "loss",
                "value": round(summary["val"]["loss"], 4),
                "name": "val loss in training, nats a token",
            }
        ],
    }
    return {
        **({"license": licence} if licence in HUB_LICENCES else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["encore", architecture],
        **({"datasets": repositories} if repositories else {}),
        "model-index": [{"name": f"encore-{architecture}", "results": [result]}],
    }


def hub_repository(source: Mapping[str, Any]) -> str | None:
    """The Hub's name of a source of data, None for one from elsewhere."""
    kind, _, place = source["dataset"].partition(":")
    return "/".join(place.split("/")[:2]) if kind == "hf" else None


def _describe_source(source: dict[str, Any], train_tokens: int) -> str:
    share = f" ({source['train_tokens'] / train_tokens:.1%})" if source["name"] else ""
    return f"{as_markdown_code(source['dataset'])} at {as_markdown_code(source['dataset_revision'])}{share}"


def as_yaml(value: dict[str, Any]) -> str:
    text = io.StringIO()
    YAML().dump(value, text)
    return text.getvalue()


def write_card(folder: Path, record: dict[str, Any], summary: dict[str, Any], is_best: bool = False) -> None:
    """Writes the card. record: what encore.json holds. summary: what metrics.json holds. is_best: whether the model is
    not the run's last one but the one that ENCORE_BEST_MODEL keeps."""
    data, params, versions = record["data"], record["params"], record["versions"]
    is_plus = params["architecture"] == PLUS
    facts = {
        "data": "; ".join(_describe_source(source, data["train_tokens"]) for source in data["sources"]),
        "licence of the data": "; ".join(as_markdown(source["licence"] or NO_LICENCE) for source in data["sources"]),
        "tokens": f"{summary['tokens_seen']:,} seen, {data['train_tokens']:,} in the training split",
        "tokenizer": f"{as_markdown_code(data['tokenizer'])}, {data['vocab_size']:,} ids",
        "parameters": f"{summary['parameters']:,}",
        "started from": as_markdown_code(params["init_from"]),
        "iterations": f"{summary['iter']:,}",
        "loss": f"train {summary['train']['loss']:.4f}, val {summary['val']['loss']:.4f} nats a token",
        "hardware": f"{summary['devices']} x {as_markdown(summary['device'])}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    lines = [
        "---",
        as_yaml(describe_for_hub(record, summary)).removesuffix("\n"),
        "---",
        "",
        f"# {TITLES[params['architecture']]} trained with Encore",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {fact} |" for name, fact in facts.items()),
        "",
        "## How to load it",
        "",
        *(TRUST if is_plus else []),
        "```python",
        *(USE_PLUS if is_plus else USE).splitlines(),
        "```",
        "",
        "`encore generate --prompt Once` does the same without transformers.",
        "What it writes may be wrong, offensive or copied from the data; it has had no further training.",
        "",
        "## How it was made",
        "",
        *(MADE_BEST if is_best else MADE),
        "",
        "```json",
        *json.dumps(params, indent=2).splitlines(),
        "```",
        "",
    ]
    write_whole(folder / CARD, "\n".join(lines).encode())
