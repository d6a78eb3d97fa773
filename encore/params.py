"""params.yaml: the schema that is its only door, and each stage's view of the keys that dvc.yaml lists for it."""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from encore.errors import EncoreError
from encore.source_params import BY_SOURCE, SHARES, SOURCE, find_mismatches

PAGE = Path("params.yaml")
PIPELINE = Path("dvc.yaml")
GPT2_VOCAB_SIZE = 50_257
TINY = 1e-12
NAME_BYTES = 255  # of file systems
STARTS = ("scratch", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def _number(value: Any) -> Any:
    """`-S learning_rate=6e-5` and `4_000_000` can arrive as strings, and true is not a number."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted")
    if isinstance(value, str):
        try:
            return float(value) if re.search(r"[.eEnN]", value) else int(value)
        except ValueError:
            raise ValueError("a number is wanted") from None
    return value


def _not_tiny(value: float) -> float:
    if 0 < value < TINY:
        raise ValueError(f"it should be at least {TINY:g}; float32 has no room below")
    return value


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no character; write the whole one") from None
    return value


def _name(value: str) -> str:
    if "\0" in value:
        raise ValueError("a name cannot hold the character NUL")
    if any(len(os.fsencode(part)) > NAME_BYTES for part in value.split("/")):
        raise ValueError(f"no file or package has a name of more than {NAME_BYTES} bytes")
    return value


def _start(value: str) -> str:
    if Path(value).parts[:1] == ("data",):
        raise ValueError("data/ is the pipeline's own, where files come and go; copy the folder elsewhere")
    if value not in STARTS and "/" not in value:
        raise ValueError(f"it should be {', '.join(STARTS)}, or the path of a folder of weights, with a / in it")
    return value


def _source(value: str) -> str:
    if not SOURCE.fullmatch(value):
        raise ValueError("a source is hf:OWNER/NAME, files:GLOB or package:NAME")
    return value


def _revision(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("it is read as a number, where 3.20 is 3.2; put it in quotes, with every digit, as '3.20'")
    return value


def _no_share(value: Any) -> Any:
    if value is not None:
        raise ValueError("it should be null, or with several sources the share of each, as {web: 0.8, code: 0.2}")
    return value


def _task(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.+:-]+", value):
        raise ValueError("a task is a name of lm-eval's, as in [hellaswag, lambada_openai]")
    return value


Integer = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
# The number of a tensor's elements fits into 64 bits, so that what is too large for the memory is told as that.
Positive = Annotated[Integer, Field(ge=1, le=10**12)]
Size = Annotated[Integer, Field(ge=1, le=2**24)]
Rate = Annotated[Real, Field(gt=0, le=100), AfterValidator(_not_tiny)]
Auto = Literal["auto"]
Text = Annotated[str, Field(strict=True, min_length=1)]
Dataset = Annotated[
    Text, AfterValidator(_name), BeforeValidator(lambda value: _source(value) if isinstance(value, str) else value)
]
Revision = Annotated[Text, BeforeValidator(_revision)]
NoShare = Annotated[None, BeforeValidator(_no_share)]
Share = Annotated[Real, Field(gt=0, le=1)]
# Keys that may have a value for each source by its name, and what each is where there is one source.
OF_SOURCE: dict[str, Any] = {"dataset": Dataset, "dataset_revision": Revision, "text_column": Text, SHARES: NoShare}


class Params(BaseModel):
    """Every key of params.yaml. The page itself says what each means; here is what each may be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Dataset | dict[str, Dataset]
    dataset_revision: Revision | dict[str, Revision]
    dataset_share: NoShare | dict[str, Share]
    text_column: Text | dict[str, Text]
    shard_order: Literal["by_name", "shuffled"]
    tokenizer: Literal["bpe", "gpt2"]
    vocab_size: Annotated[Integer, Field(ge=257, le=2**31)]
    token_cap: Positive
    val_fraction: Annotated[Real, Field(gt=0, lt=1)]
    split_seed: Annotated[Integer, Field(ge=0)]

    architecture: Literal["gpt2", "nanochat", "nanochat-plus"]
    n_layer: Size
    n_head: Size
    n_embd: Size
    block_size: Size
    bias: Annotated[bool, Field(strict=True)]
    dropout: Annotated[Real, Field(ge=0, lt=1)]
    document_masking: Annotated[bool, Field(strict=True)]
    init_from: Annotated[
        Text, AfterValidator(_name), BeforeValidator(lambda value: _start(value) if isinstance(value, str) else value)
    ]

    seed: Annotated[Integer, Field(ge=0, lt=2**32)]
    batch_size: Size
    gradient_accumulation_steps: Size
    max_iters: Positive
    optimizer: Literal["adamw", "muon"]
    learning_rate: Rate | Auto
    embedding_lr: Rate | Auto | None
    head_lr: Rate | Auto | None
    lr_schedule: Literal["cosine", "trapezoid"]
    warmup_iters: Annotated[Integer, Field(ge=0)]
    lr_decay_iters: Positive | None
    warmdown_ratio: Annotated[Real, Field(gt=0, le=1)] | None
    min_lr: Annotated[Real, Field(ge=0)]
    weight_decay: Annotated[Real, Field(ge=0, le=1000)] | Auto
    beta1: Annotated[Real, Field(ge=0, lt=1)]
    beta2: Annotated[Real, Field(ge=0, lt=1)]
    grad_clip: Annotated[Real, Field(ge=0, le=10**9), AfterValidator(_not_tiny)]

    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    compile: Literal["auto", True, False]
    log_interval: Positive
    eval_interval: Positive
    eval_iters: Size
    checkpoint_interval: Positive
    keep_checkpoints: Size

    start: Annotated[str, Field(strict=True), AfterValidator(_text)]
    num_samples: Annotated[Integer, Field(ge=0, le=2**24)]
    max_new_tokens: Positive
    temperature: Annotated[Real, Field(ge=0, le=1000)]
    top_k: Positive | None
    evaluate_tasks: list[Annotated[Text, AfterValidator(_name), BeforeValidator(_task)]]


class StageParams:
    """The keys that dvc.yaml lists for one stage, as attributes. Any other key is an error."""

    def __init__(self, stage: str, values: dict[str, Any]) -> None:
        self._stage = stage
        self._values = values

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):  # what copy and pickle ask of every object
            raise AttributeError(key)
        if key not in self._values:
            raise EncoreError(
                f"stage {self._stage} reads params.yaml's {key}, which DVC does not track for it: "
                f"add `- {key}` to stages.{self._stage}.params in {PIPELINE}"
            )
        return self._values[key]

    def as_dict(self) -> dict[str, Any]:
        """The keys and values in the order of dvc.yaml."""
        return dict(self._values)


def load_params(stage: str) -> StageParams:
    """Validates all of params.yaml and hands out the keys that dvc.yaml lists for `stage`.

    Raises EncoreError with every problem of the page at once.
    """
    params = check_page(PAGE).model_dump()
    stages = _read_yaml(PIPELINE).get("stages", {})
    if stage not in stages:
        raise EncoreError(f"{PIPELINE} has no stage named {stage}; it has {', '.join(stages)}")
    keys = stages[stage].get("params", [])
    unknown = [key for key in keys if key not in params]
    if unknown:
        raise EncoreError(f"{PIPELINE} lists {', '.join(unknown)} for stage {stage}, which params.yaml does not have")
    return StageParams(stage, {key: params[key] for key in keys})


def check_page(path: Path) -> Params:
    """Reads and validates a whole page of parameters. Raises EncoreError listing every problem found."""
    page = _read_yaml(path)
    problems = find_problems(page)
    if problems:
        raise EncoreError(list_problems(path, problems))
    return Params.model_validate(page)


def list_problems(path: Path, problems: list[str]) -> str:
    """A page's problems, one a line."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n  ".join([f"{path} has {count}; nothing was run:", *problems])


def find_problems(page: dict[str, Any]) -> list[str]:
    """One sentence for each key that is unknown, missing or wrong, and for each pair that cannot work together."""
    known = Params.model_fields
    problems = []
    for key in page:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            problems.append(f"{key}: no such key" + (f"; did you mean {nearest[0]}?" if nearest else "; remove it"))
    valid: dict[str, Any] = {}
    for key, field in known.items():
        if key not in page:
            problems.append(f"{key}: missing; presets/quickstart.yaml has a line for it")
            continue
        annotation: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        value = page[key]
        if key in OF_SOURCE and isinstance(value, dict) and value:
            of_source, wrong = _validate_by_source(key, value)
            problems += wrong
            if not wrong:
                valid[key] = of_source
            continue
        try:
            valid[key] = TypeAdapter(OF_SOURCE.get(key, annotation)).validate_python(value)
        except ValidationError as error:
            problems.append(f"{key}: {_quote(value)} will not do; {_why(error)}")
    return problems + _find_conflicts(valid)


def _validate_by_source(key: str, values: dict[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """The valid values of a key that has one for each source, and a sentence for each of the others."""
    valid, problems = {}, []
    for name, value in values.items():
        annotation = Share if key == SHARES else OF_SOURCE[key]
        try:
            valid[name] = TypeAdapter(annotation).validate_python(value)
        except ValidationError as error:
            problems.append(f"{key}.{name}: {_quote(value)} will not do; {_why(error)}")
    return valid, problems


def find_warnings(params: Params) -> list[str]:
    """What is allowed and probably not meant."""
    decay = params.lr_decay_iters
    if decay is not None and decay != params.max_iters:
        return [
            f"lr_decay_iters is {decay} and max_iters is {params.max_iters}, so training will not end at min_lr "
            "just as the decay does; lr_decay_iters: null follows max_iters"
        ]
    return []


def _find_conflicts(valid: dict[str, Any]) -> list[str]:
    """Checks across keys; one that needs a key which is itself wrong waits until that is mended."""

    def have(*keys: str) -> bool:
        return all(key in valid for key in keys)

    problems = []
    if have("n_embd", "n_head") and valid["n_embd"] % valid["n_head"]:
        problems.append(f"n_embd: {valid['n_embd']} does not divide by n_head, {valid['n_head']}")
    if valid.get("learning_rate", "auto") != "auto" and have("min_lr") and valid["min_lr"] > valid["learning_rate"]:
        problems.append(f"min_lr: {valid['min_lr']} is above learning_rate, {valid['learning_rate']}")
    if have("lr_decay_iters", "max_iters", "warmup_iters"):
        decay = valid["lr_decay_iters"] or valid["max_iters"]
        if valid["warmup_iters"] > decay:
            name = "lr_decay_iters" if valid["lr_decay_iters"] else "max_iters"
            problems.append(f"warmup_iters: {valid['warmup_iters']} is above {name}, {decay}; warm up for less")
    if have("architecture", "n_embd", "n_head", "bias", "dropout") and valid["architecture"] != "gpt2":
        problems += _find_what_nanochat_lacks(valid)
    if have("architecture", "optimizer", "embedding_lr", "head_lr"):
        problems += _find_wrong_rates(valid)
    if have("lr_schedule", "warmdown_ratio", "lr_decay_iters", "max_iters", "warmup_iters"):
        problems += _find_wrong_warmdown(valid)
    if have("tokenizer", "vocab_size") and valid["tokenizer"] == "gpt2" and valid["vocab_size"] != GPT2_VOCAB_SIZE:
        problems.append(f"vocab_size: {valid['vocab_size']} will not do; the gpt2 tokenizer has {GPT2_VOCAB_SIZE}")
    if have(*BY_SOURCE, SHARES):
        problems += find_mismatches(valid)
    return problems


def _find_what_nanochat_lacks(valid: dict[str, Any]) -> list[str]:
    problems = []
    name = valid["architecture"]
    if valid["bias"]:
        problems.append(f"bias: True will not do; architecture {name} has no biases, set false")
    if valid["dropout"]:
        problems.append(f"dropout: {valid['dropout']} will not do; architecture {name} drops nothing, set 0.0")
    if valid["n_embd"] % (2 * valid["n_head"]):
        problems.append(
            f"n_head: {valid['n_head']} heads of width {valid['n_embd'] / valid['n_head']:g} will not do; architecture "
            f"{name} rotates pairs of numbers, so n_embd must divide by 2 x n_head"
        )
    return problems


def _find_wrong_rates(valid: dict[str, Any]) -> list[str]:
    """AdamW has one learning rate, Muon's company has its own for the embeddings and for an output matrix."""
    muon = valid["optimizer"] == "muon"
    wanted = {"embedding_lr": muon, "head_lr": muon and valid["architecture"] != "gpt2"}
    problems = []
    for key, is_wanted in wanted.items():
        if is_wanted and valid[key] is None:
            problems.append(f"{key}: null will not do; optimizer muon leaves these weights to AdamW, give its rate")
        if not is_wanted and valid[key] is not None:
            problems.append(
                f"{key}: {valid[key]} would change nothing with optimizer {valid['optimizer']} and architecture "
                f"{valid['architecture']}; set null"
            )
    return problems


def _find_wrong_warmdown(valid: dict[str, Any]) -> list[str]:
    ratio = valid["warmdown_ratio"]
    if (valid["lr_schedule"] == "trapezoid") != (ratio is not None):
        way_out = "set null" if ratio is not None else "give the share in which it falls, as 0.6"
        return [f"warmdown_ratio: {_quote(ratio)} will not do for lr_schedule {valid['lr_schedule']}; {way_out}"]
    decay = valid["lr_decay_iters"] or valid["max_iters"]
    if ratio is not None and valid["warmup_iters"] + ratio * decay > decay:
        return [
            f"warmdown_ratio: {ratio} of {decay} iterations leaves {decay - ratio * decay:g} for warmup_iters, "
            f"{valid['warmup_iters']}; lower one of them"
        ]
    return []


def _read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML 1.2 mapping, as DVC does. Raises EncoreError with the line of what is wrong."""
    try:
        page = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EncoreError(f"{path} is missing; {_way_back(path)}") from None
    except UnicodeDecodeError as error:
        raise EncoreError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(str(error.problem).split())
        raise EncoreError(f"{path}{line}: {problem}") from None
    except (YAMLError, ValueError) as error:  # ValueError: a date or a tagged number that is none
        raise EncoreError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(page, dict):
        raise EncoreError(f"{path} holds no `key: value` lines; {_way_back(path)}")
    return page


def _way_back(path: Path) -> str:
    source = f"git checkout {path}" if path == PIPELINE else f"cp presets/quickstart.yaml {path}"
    return f"`{source}` brings it back"


def _quote(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 100 else f"{text[:90]}..."


def _why(error: ValidationError) -> str:
    """Pydantic's reason, without its prefix; where several types were tried, the first that is not null's."""
    reasons = [
        entry["msg"].removeprefix("Value error, ") for entry in error.errors() if entry["type"] != "none_required"
    ]
    reason = reasons[0].replace("Input should be", "it should be")
    return reason[0].lower() + reason[1:]
