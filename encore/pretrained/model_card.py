"""README.md of model/: what the model is, in the form that the Hugging Face Hub shows as a model card.

It holds nothing that a clock says, nor the commit: the same run writes the same bytes, whenever and from wherever.
"""

import json
from pathlib import Path
from typing import Any

from encore.files import write_whole
from encore.pretrained.markup import as_markdown, as_markdown_code

CARD = "README.md"
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
WITH_TRANSFORMERS = [
    "```python",
    *USE.splitlines(),
    "```",
    "",
    "`encore generate --prompt Once` does the same without transformers.",
]
WITHOUT_TRANSFORMERS = [
    "`encore generate --prompt Once`. transformers cannot load it: it has no such model.",
    "",
]


def write_card(folder: Path, record: dict[str, Any], summary: dict[str, Any]) -> None:
    """Writes the card. record: what encore.json holds. summary: what metrics.json holds."""
    data, params, versions = record["data"], record["params"], record["versions"]
    kind, _, place = data["dataset"].partition(":")
    datasets = [f"datasets: [{'/'.join(place.split('/')[:2])}]"] if kind == "hf" else []
    is_known = params["architecture"] != "nanochat-plus"
    library = ["library_name: transformers"] if is_known else []
    front = ["---", *library, "pipeline_tag: text-generation", *datasets, "---"]
    facts = {
        "data": f"{as_markdown_code(data['dataset'])} at {as_markdown_code(data['dataset_revision'])}",
        "licence of the data": as_markdown(data["licence"] or "not named by the source: look there before you publish"),
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
        *front,
        "",
        f"# {TITLES[params['architecture']]} trained with Encore",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {fact} |" for name, fact in facts.items()),
        "",
        "## How to load it",
        "",
        *(WITH_TRANSFORMERS if is_known else WITHOUT_TRANSFORMERS),
        "What it writes may be wrong, offensive or copied from the data; it has had no further training.",
        "",
        "## How it was made",
        "",
        "`dvc repro` in the commit whose dvc.lock names this folder's hash (`git log -S HASH -- dvc.lock`), with these",
        "parameters; encore.json has them too, and the hashes of data and code.",
        "",
        "```json",
        *json.dumps(params, indent=2).splitlines(),
        "```",
        "",
    ]
    write_whole(folder / CARD, "\n".join(lines).encode())
