"""What is in the JSON files that Encore reads, and in DVC's YAML: encore/json_files.py compares them with this.

EXACTLY: files of Encore's own. AT_LEAST: those of others, and those whose every value is not told here.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict  # the standard library's serves pydantic from Python 3.12 on

EXACTLY = ConfigDict(extra="forbid", strict=True)
AT_LEAST = ConfigDict(extra="allow", strict=True)
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern="^[^/]+$")]  # of a file that lies beside


def _check_md5(md5: str | int | None) -> str | int | None:
    if md5 and len(str(md5)) < 3:
        raise ValueError("too short for a hash")
    return md5


@with_config(EXACTLY)
class RawFileEntry(TypedDict):
    """As encore.download.raw_folder.RawFile."""

    name: Name
    source: str
    bytes: Count
    sha256: Sha256
    documents: Count


@with_config(EXACTLY)
class RanksEntry(TypedDict):
    """A published tokenizer."""

    name: Name
    sha256: Sha256


@with_config(EXACTLY)
class RawSource(TypedDict):
    """The text of one source. name: None where it is the only one."""

    name: str | None
    dataset: str
    dataset_revision: str
    licence: str | None
    text_column: str
    source_files: Count
    whole_source: bool
    text_bytes: Count
    repaired_documents: Count
    files: list[RawFileEntry]


@with_config(EXACTLY)
class RawManifest(TypedDict):
    """data/raw/manifest.json."""

    sources: list[RawSource]
    text_bytes_per_token: float
    tokenizer: RanksEntry | None
    own_sha256: Sha256


@with_config(EXACTLY)
class ShardEntry(TypedDict):
    """As encore.tokens.token_files.Shard."""

    name: Name
    tokens: Count
    documents: Count
    text_bytes: Count
    sha256: Sha256


@with_config(EXACTLY)
class SplitOfSource(TypedDict):
    """What of a split comes from one source: so many of its shards, and what they hold."""

    shards: Count
    tokens: Count
    documents: Count
    text_bytes: Count


@with_config(EXACTLY)
class TokenSource(TypedDict):
    """What comes from one source. name: None where it is the only one. token_cap: its share of the cap. splits: train
    and val."""

    name: str | None
    dataset: str
    dataset_revision: str
    licence: str | None
    whole_source: bool
    token_cap: Count
    cap_reached: bool
    empty_documents: Count
    documents_with_end_of_text: Count
    cut_documents: Count
    splits: dict[str, SplitOfSource]


@with_config(EXACTLY)
class TokenManifest(TypedDict):
    """data/tokens/manifest.json. shards: of train and of val, each source's behind those of the one before."""

    sources: list[TokenSource]
    dtype: str
    vocab_size: Count
    tokenizer: str
    tokenizer_sha256: Sha256
    text_bytes_per_token: float
    shards: dict[str, list[ShardEntry]]
    own_sha256: Sha256


@with_config(EXACTLY)
class PartRecord(TypedDict):
    """part.json, of encore.tokens.parts."""

    shards: dict[str, list[ShardEntry]]
    stopped_at: Count | None
    remarks: dict[str, Count]
    tokenizer_sha256: Sha256
    own_sha256: Sha256


@with_config(EXACTLY)
class LearnedRanks(TypedDict):
    """learned.json, of encore.tokens.parts."""

    sha256: Sha256
    own_sha256: Sha256


@with_config(EXACTLY)
class InitManifest(TypedDict):
    """data/init/manifest.json. files: the sha256 of each by its name."""

    init_from: str
    files: dict[str, Sha256]
    own_sha256: Sha256


@with_config(EXACTLY)
class TasksManifest(TypedDict):
    """data/tasks/manifest.json. files: the sha256 of each by its path in the folder."""

    tasks: list[str]
    lm_eval: str | None
    files: dict[str, Sha256]
    own_sha256: Sha256


@with_config(AT_LEAST)
class RunIdentity(TypedDict):
    """run.json, of training/run_folder.py: the parameters too. It only serves to tell of a run like another."""

    data_sha256: Sha256
    init_sha256: Sha256 | None


@with_config(EXACTLY)
class CodeEntry(TypedDict):
    """Which code trained from an iteration on."""

    from_iter: Count
    sha256: Sha256


@with_config(AT_LEAST)
class CheckpointState(TypedDict):
    """state.json of a checkpoint. sha256: of the files beside it. The rest is the trainer's and its records'."""

    iter: Count
    code: NotRequired[list[CodeEntry]]
    sha256: dict[str, Sha256]
    own_sha256: Sha256


@with_config(EXACTLY)
class WandbRecord(TypedDict):
    """wandb.json, of training/wandb_run.py. iter: of the last row that wandb has, -1 where it has none. open_folder:
    that wandb writes offline. A run that has ended has a summary, and the sha256 of its model's encore.json."""

    id: str
    project: str
    iter: int
    open_folder: NotRequired[str]
    summary: NotRequired[dict[str, Any]]
    model_sha256: NotRequired[Sha256]


@with_config(EXACTLY)
class ModelRecord(TypedDict):
    """model/encore.json: what made the weights. A model that was saved without training has less; those from before
    there were hashes lack the last two."""

    bias: NotRequired[bool]  # of GPT-2
    document_masking: NotRequired[bool]
    params: NotRequired[dict[str, Any]]
    data: NotRequired[dict[str, Any]]
    data_sha256: NotRequired[Sha256]
    init_sha256: NotRequired[Sha256 | None]
    iter: NotRequired[Count]
    code: NotRequired[list[CodeEntry]]
    versions: NotRequired[dict[str, str]]
    files_sha256: NotRequired[dict[str, Sha256]]
    own_sha256: NotRequired[Sha256]


@with_config(AT_LEAST)
class HubConfig(TypedDict):
    """config.json, transformers' or ours; the shape's keys have other names in each architecture."""

    model_type: str
    vocab_size: Size
    n_layer: NotRequired[Size]
    n_head: NotRequired[Size]
    n_embd: NotRequired[Size]
    n_positions: NotRequired[Size]
    num_hidden_layers: NotRequired[Size]
    num_attention_heads: NotRequired[Size]
    hidden_size: NotRequired[Size]
    max_position_embeddings: NotRequired[Size]


@with_config(AT_LEAST)
class Loss(TypedDict):
    """Nats a token."""

    loss: float


@with_config(AT_LEAST)
class RunMetrics(TypedDict):
    """metrics/metrics.json, as far as it is read."""

    iter: Size
    lr: float
    mfu: NotRequired[float]  # as the two below, only of a run on a GPU
    tokens_per_second: float
    train: Loss
    val: Loss
    tokens_seen: Count
    peak_tflops: NotRequired[float]
    mfu_basis: NotRequired[str]
    device: str
    devices: int


@with_config(AT_LEAST)
class SplitMetrics(TypedDict):
    """The loss over the whole val split."""

    loss: float
    perplexity: float
    bits_per_byte: float


@with_config(AT_LEAST)
class EvalMetrics(TypedDict):
    """metrics/eval.json, as far as it is read."""

    eval: SplitMetrics


@with_config(AT_LEAST)
class Metrics(TypedDict):
    """Any of the metrics."""


@with_config(AT_LEAST)
class LockedFile(TypedDict):
    """A dependency or output in dvc.lock. md5: a number where YAML takes it for one, and DVC lets it be empty."""

    path: str
    md5: NotRequired[Annotated[str | int | None, AfterValidator(_check_md5)]]
    hash: NotRequired[str]
    size: NotRequired[int]
    nfiles: NotRequired[int]
    isexec: NotRequired[bool | int]


@with_config(AT_LEAST)
class LockedStage(TypedDict):
    """A stage that has run."""

    cmd: str | list[str]
    deps: NotRequired[list[LockedFile]]
    outs: NotRequired[list[LockedFile]]
    params: NotRequired[dict[str, dict[str, Any]]]


@with_config(AT_LEAST)
class CacheEntry(TypedDict):
    """A file of a folder, in the object that DVC's cache has of the folder."""

    md5: str
    relpath: str


@with_config(AT_LEAST)
class Lockfile(TypedDict):
    """dvc.lock, as far as DVC would refuse another one."""

    schema: Literal["2.0"]
    stages: NotRequired[dict[str, LockedStage]]


@with_config(AT_LEAST)
class Pipeline(TypedDict):
    """dvc.yaml."""

    stages: dict[str, dict[str, Any]]


@with_config(EXACTLY)
class StageRun(TypedDict):
    """The dvc that ran a stage."""

    pid: Count
    started: str


@with_config(EXACTLY)
class HistoryLine(TypedDict):
    """A line of history.jsonl."""

    stage: str
    started: str
    seconds: float
    run: StageRun
    witness: str
    sha256: Sha256
    own_sha256: NotRequired[Sha256]
