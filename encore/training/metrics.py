"""What a run leaves to read: rows for the curves, lines for training.log, the same numbers for wandb and TensorBoard.

Rows are kept in memory and in the checkpoints, and written out whole: a resumed run can neither double nor lose one.
What must repeat bit for bit (losses, learning rate, gradient norm) and what a clock says are in different files.
"""

from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from encore.files import write_tsv, write_whole
from encore.json_files import flatten
from encore.progress import as_duration, print_line
from encore.training.tensorboard import TensorBoard
from encore.training.wandb_run import WandbRun

MOST_ROWS = 4000  # what a plots page draws quickly
VAL_OF = "val_loss_"  # and the name of a source: a key of an evaluation


@dataclass
class Rows:
    """The rows of the three curves, in the order of `iter`, the number of optimizer steps that are done."""

    train: list[dict[str, Any]] = field(default_factory=list)
    eval: list[dict[str, Any]] = field(default_factory=list)
    speed: list[dict[str, Any]] = field(default_factory=list)


class Records:
    """Takes a run's numbers once and passes them on to the curves, the log, wandb and TensorBoard.

    writes: no, on a rank that only goes along: it keeps the rows and shows nothing.
    """

    def __init__(
        self,
        metrics_folder: Path,
        log_path: Path,
        wandb_run: WandbRun | None,
        tensorboard: TensorBoard | None = None,
        writes: bool = True,
    ) -> None:
        self.rows = Rows()
        self.samples: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self._metrics_folder, self._log_path, self._writes = metrics_folder, log_path, writes
        self._wandb, self._tensorboard = wandb_run, tensorboard
        self._rewrite_log()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rows": vars(self.rows), "samples": self.samples, "lines": self.lines}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up the rows and lines of a checkpoint, and nothing that came after it. wandb is given those that it
        lacks, TensorBoard all."""
        self.rows, self.lines = Rows(**state["rows"]), state["lines"]
        self.samples = state.get("samples", [])  # checkpoints of older code have none
        self._rewrite_log()
        steps = [_step_row(*rows) for rows in zip(self.rows.train, self.rows.speed, strict=True)]
        for row in sorted([*steps, *map(_eval_row, self.rows.eval), *self.samples], key=itemgetter("iter")):
            self._pass_on(row)

    def say(self, line: str) -> None:
        """A line for the screen and for training.log."""
        self.lines.append(line)
        if not self._writes:
            return
        print_line(line)
        with self._log_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def log_step(
        self,
        train: dict[str, Any],
        speed: dict[str, Any],
        max_iters: int,
        seconds_left: float | None,
        gpu_bytes: int | None,
    ) -> None:
        """The rows of one logged step. seconds_left: until the run ends. gpu_bytes: the GPU memory that it takes."""
        self.rows.train.append(train)
        self.rows.speed.append(speed)
        facts = [
            f"loss {train['loss']:.4f}",
            f"lr {train['lr']:.2e}",
            f"{speed['ms_per_iter']:.1f} ms",
            f"{speed['tokens_per_second']:,.0f} tokens/s",
        ]
        facts += [f"mfu {speed['mfu']:.2%}"] if "mfu" in speed else []
        facts += [f"{gpu_bytes / 1e9:.1f} GB"] if gpu_bytes else []
        facts += [f"{as_duration(seconds_left)} left"] if seconds_left else []
        self.say(f"iter {train['iter']}/{max_iters}: {', '.join(facts)}")
        self._pass_on(_step_row(train, speed))

    def log_eval(self, row: dict[str, Any]) -> None:
        """The row of one evaluation."""
        self.rows.eval.append(row)
        of_sources = [f"{key.removeprefix(VAL_OF)} {loss:.4f}" for key, loss in row.items() if key.startswith(VAL_OF)]
        mixture = f" ({', '.join(of_sources)})" if of_sources else ""
        self.say(f"iter {row['iter']}: train loss {row['train_loss']:.4f}, val loss {row['val_loss']:.4f}{mixture}")
        self._pass_on(_eval_row(row))

    def log_sample(self, iteration: int, text: str) -> None:
        """What the model writes at an iteration. The log has it on one line, as Python spells it."""
        row = {"iter": iteration, "sample": text}
        self.samples.append(row)
        self.say(f"iter {iteration}: sample: {text!r}")
        self._pass_on(row)

    def _pass_on(self, row: dict[str, Any]) -> None:
        if self._wandb:
            self._wandb.log(row)
        if self._tensorboard:
            self._tensorboard.log(row)

    def _rewrite_log(self) -> None:
        if self._writes:
            write_whole(self._log_path, "".join(line + "\n" for line in self.lines).encode())

    def finish(self, summary: dict[str, Any], model_sha256: str) -> None:
        """Publishes the curves and gives wandb the run's summary. model_sha256: of the model's encore.json."""
        self.publish()
        if self._wandb:
            self._wandb.finish(flatten(summary, "/"), model_sha256)
        if self._tensorboard:
            self._tensorboard.end()

    def break_off(self) -> None:
        """Ends the run for wandb, as one that has not come to its end, and for TensorBoard."""
        if self._wandb:
            self._wandb.end(exit_code=1)
        if self._tensorboard:
            self._tensorboard.end()

    def publish(self) -> None:
        """Writes the curves as they are now: train.tsv, eval.tsv and speed.tsv."""
        for name, rows in vars(self.rows).items():
            if rows and self._writes:
                write_tsv(self._metrics_folder / f"{name}.tsv", thin(rows))


def thin(rows: list[dict[str, Any]], most: int = MOST_ROWS) -> list[dict[str, Any]]:
    """Every row, or every second, fourth, ... so that at most `most` are left, and always the last."""
    stride = 1
    while -(-len(rows) // stride) > most - 1:
        stride *= 2
    kept = rows[::stride]
    return kept if not rows or kept[-1] is rows[-1] else [*kept, rows[-1]]


def _step_row(train: dict[str, Any], speed: dict[str, Any]) -> dict[str, Any]:
    """What wandb and TensorBoard are given of a logged step."""
    return {
        "iter": train["iter"],
        "lr": train["lr"],
        **({"mfu": speed["mfu"]} if "mfu" in speed else {}),
        "train/step_loss": train["loss"],
        "train/grad_norm": train["grad_norm"],
        "tokens_per_second": speed["tokens_per_second"],
    }


def _eval_row(row: dict[str, Any]) -> dict[str, Any]:
    """What wandb and TensorBoard are given of an evaluation."""
    return {key.replace("_loss", "/loss", 1): value for key, value in row.items()}
