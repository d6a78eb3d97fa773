"""The training loop: exactly `max_iters` optimizer steps, and the same weights however often it was interrupted."""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from encore.code import code_sha256
from encore.devices.device import Hardware, autocast, peak_memory_bytes
from encore.devices.distributed import ALONE, Ranks
from encore.devices.sharding import gather
from encore.errors import EncoreError, Interrupted
from encore.evaluation.losses import sum_losses
from encore.integrity import Verification
from encore.models.architectures import Model, make_model
from encore.models.flops import flops_per_token
from encore.params import StageParams
from encore.progress import Progress
from encore.signals import StopRequest
from encore.tokens.batches import Ahead, Windows
from encore.training.best_model import is_best
from encore.training.checkpoint import TRAINING, Checkpoint, Saver, restore
from encore.training.compiled_check import check_compiled
from encore.training.lr_schedule import get_lr
from encore.training.memory_snapshot import memory_recorder
from encore.training.metrics import Records
from encore.training.optim import make_optimizers
from encore.training.profile import profiler
from encore.training.samples import Sampler
from encore.training.step_numbers import StepNumbers


class Trainer:
    """Holds what changes from step to step. `iter` counts the optimizer steps that are done."""

    def __init__(
        self,
        params: StageParams,
        model: Model,
        train: Windows,
        val: Windows,
        hardware: Hardware,
        records: Records,
        checkpoints: Path,
        data: Verification,
        ranks: Ranks = ALONE,
    ) -> None:
        self.params, self.model, self.train, self.val = params, model, train, val
        self.hardware, self.records, self.checkpoints, self.data = hardware, records, checkpoints, data
        self.device, self.dtype = hardware.device, hardware.dtype
        self.ranks = ranks
        self.parallel = ranks.wrap(model)
        self.forward = torch.compile(self.parallel) if hardware.compiles else self.parallel
        self.optimizers = make_optimizers(model, params)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.windows_per_step = params.batch_size * params.gradient_accumulation_steps
        self.tokens_per_step = self.windows_per_step * params.block_size
        self.batches = Ahead(train, self.my_windows, params.batch_size, pinned=self.device.type == "cuda")
        self.iter = 0
        self._verified = False  # whether the data is what its manifest says
        self.saver = Saver(checkpoints, params.keep_checkpoints, ranks)
        self.code = [{"from_iter": 0, "sha256": code_sha256(TRAINING)}]
        self._launched: StepNumbers | None = None  # the last step, while nobody has waited for it
        self._last_step: dict[str, float | None] = {}  # loss, learning rate, norm of the gradient of the one that ended
        self._step_seconds: list[float] = []  # of the steps since the last record
        self.keep_best: Callable[[], None] | None = None  # all ranks are to have it, or none; and so with the sampler
        self.sampler: Sampler | None = None
        # A process's first step compiles and allocates; iteration and time at its end.
        self._first_step_seconds = 0.0
        self._warm_since: tuple[int, float] | None = None

    def check_compiled(self) -> None:
        """Raises EncoreError where the compiler has made something else of the model. All ranks must come."""
        if self.hardware.compiles:
            windows = self.train.for_step(0, self.windows_per_step, self.params.seed)[: len(self.my_windows(0))]
            batch = self.train.batch(windows[: self.params.batch_size])
            check_compiled(self.model, self.forward, self.parallel, batch, self.device, self.dtype, self.ranks)

    def resume(self, found: Checkpoint | None) -> None:
        """Takes up rank 0's checkpoint of this run; the other ranks have none to give."""
        state = self.ranks.from_first(found.state if found else None)
        restore(found.path if found else None, self.model, self.optimizers, self.ranks)
        self.records.restore(state)
        self.iter = state["iter"]
        self._last_step, self._step_seconds = state["last_step"], state["step_seconds"]
        self._first_step_seconds = state["first_step_seconds"]
        self.scaler.load_state_dict(state["scaler"])
        earlier, now = state["code"], self.code[0]["sha256"]
        self.code = earlier if earlier[-1]["sha256"] == now else [*earlier, {"from_iter": self.iter, "sha256": now}]

    def run(self, stop: StopRequest) -> None:
        """Trains to `max_iters`. Raises Interrupted, after saving, where `stop` was asked for."""
        params = self.params
        try:
            shown = self.ranks.is_first
            with (
                Progress("train", params.max_iters, "iters", self.iter, lines=False, bar=shown) as progress,
                profiler(self.iter, shown) as profile,
                memory_recorder(self.iter, shown, self.device) as memory,
            ):
                if not self.records.rows.eval:
                    self.evaluate()
                while self.iter < params.max_iters:
                    self.step()
                    progress.add(1)
                    if profile:
                        profile.step()
                    if memory:
                        memory.step()
                    if self.iter % params.log_interval == 0:
                        self.log()
                    if self.iter % params.eval_interval == 0:
                        self.evaluate()
                    if self.sampler and self.sampler.is_due(self.iter):
                        self.sample(self.sampler)
                    last = self.iter == params.max_iters
                    stopped_by = self.ranks.largest(stop.signal_number or 0)
                    if self.iter % params.checkpoint_interval == 0 or last or stopped_by:
                        self.save()
                    if stopped_by and not last:
                        name = signal.Signals(stopped_by).name
                        message = f"{name}: saved at iteration {self.iter} of {params.max_iters}; "
                        message += "run the same command to go on from there"
                        raise Interrupted(stopped_by, message if self.ranks.is_first else "")
                self.check_data()
                self.end_curves()
        finally:
            self.saver.finish()

    def end_curves(self) -> None:
        """The rows that a run has because it ends. They are in no checkpoint, so that a run which is extended has the
        rows of one that went on."""
        if not self.records.rows.train or self.records.rows.train[-1]["iter"] != self.iter:
            self.log()
        if self.records.rows.eval[-1]["iter"] != self.iter:
            self.evaluate()

    def step(self) -> None:
        """Launches one optimizer step, and reads the numbers of the one before. Raises EncoreError where those are not
        finite."""
        params = self.params
        started = time.perf_counter()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.scheduled_lr(group["initial_lr"])
        batches = self.batches.take(self.iter)
        # Dropout's randomness depends on the step alone, so there is no generator's state to save.
        torch.manual_seed(params.seed * 2**31 + self.iter * self.ranks.count + self.ranks.rank)
        loss = torch.zeros((), device=self.device)
        for number, (idx, targets) in enumerate(batches, start=1):
            idx, targets = (part.to(self.device, non_blocking=True) for part in (idx, targets))
            with self.ranks.without_sync(self.parallel, last=number == len(batches)):
                with autocast(self.device, self.dtype):
                    micro_loss = self.forward(idx, targets)
                micro_loss = micro_loss * (len(idx) * self.ranks.count / self.windows_per_step)
                self.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        lr = self.scheduled_lr(params.learning_rate)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), params.grad_clip or float("inf"))
        values = torch.stack([self.ranks.sum(loss) / self.ranks.count, gather(grad_norm)])
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.iter += 1
        launched = StepNumbers.begin_copy(self.iter, lr, self.scaler.is_enabled(), values)
        self._read_numbers()
        self._launched = launched
        if not self._warm_since:
            self._read_numbers()
        seconds = time.perf_counter() - started
        if self._warm_since:
            self._step_seconds.append(seconds)
        else:
            self._first_step_seconds, self._warm_since = seconds, (self.iter, time.perf_counter())

    def settle(self) -> None:
        """Waits until the steps so far are done. Raises EncoreError where the last one's numbers are not finite, so
        comes before anything that is to outlive them."""
        started = time.perf_counter()
        self._read_numbers()
        if self._step_seconds:
            self._step_seconds[-1] += time.perf_counter() - started

    def _read_numbers(self) -> None:
        """Of the step that was launched last."""
        if self._launched:
            self._last_step = self._launched.read(self.my_windows)
            self._launched = None

    def scheduled_lr(self, highest: float) -> float:
        """The learning rate of the step to come, for parameters whose highest is this; all rise and fall alike."""
        params = self.params
        return get_lr(
            self.iter,
            highest,
            params.min_lr * (highest / params.learning_rate),
            params.warmup_iters,
            params.lr_decay_iters or params.max_iters,
            params.warmdown_ratio,
        )

    def my_windows(self, step: int) -> np.ndarray:
        """This rank's windows of a step."""
        return self.ranks.share(self.train.for_step(step, self.windows_per_step, self.params.seed))

    def log(self) -> None:
        """Records the step just done and the speed since the last record."""
        self.settle()
        # The first step of a process counts only where it is alone.
        timed = self._step_seconds or [self._first_step_seconds]
        seconds = sum(timed) / len(timed)
        self._step_seconds = []
        tokens_per_second = self.tokens_per_step / seconds
        flops_per_second = tokens_per_second * flops_per_token(self.model)
        peak = self.hardware.peak
        train_row = {"iter": self.iter, **self._last_step}
        speed_row = {
            "iter": self.iter,
            "ms_per_iter": seconds * 1e3,
            "tokens_per_second": tokens_per_second,
            "tflops": flops_per_second / 1e12,
            **({"mfu": flops_per_second / (peak.flops_per_second * self.ranks.count)} if peak else {}),
        }
        gpu_bytes = peak_memory_bytes(self.device)
        self.records.log_step(train_row, speed_row, self.params.max_iters, self.seconds_left(), gpu_bytes)

    def seconds_left(self) -> float | None:
        """How long the rest of the run takes at the pace since this process's first step, which compiles; evaluations
        and checkpoints are in it. None where that step was the only one."""
        first, since = self._warm_since or (self.iter, 0.0)
        done = self.iter - first
        return (self.params.max_iters - self.iter) * (time.perf_counter() - since) / done if done else None

    def evaluate(self) -> None:
        """Records the losses over the same windows of both splits each time. Raises EncoreError where one is not
        finite."""
        self.settle()
        most_windows = self.params.eval_iters * self.params.batch_size
        losses: dict[str, float] = {}
        of_sources: dict[str, float] = {}
        for name, windows in (("train", self.train), ("val", self.val)):
            sums = {
                source: self._sum_losses(windows, indices)
                for source, indices in windows.spread_by_source(most_windows).items()
            }
            losses[f"{name}_loss"] = sum(nats for nats, _ in sums.values()) / sum(tokens for _, tokens in sums.values())
            of_sources |= {f"{name}_loss_{source}": nats / tokens for source, (nats, tokens) in sums.items() if source}
        if not all(map(math.isfinite, losses.values())):
            raise EncoreError(
                f"iteration {self.iter}: an evaluation finds train loss {losses['train_loss']} and val loss "
                f"{losses['val_loss']}; lower learning_rate, set dtype: float32, or start from other weights"
            )
        self.records.log_eval({"iter": self.iter, **losses, **of_sources})
        self.records.publish()
        if self.keep_best and is_best(self.records.rows.eval):
            self.check_data()
            self.keep_best()

    def sample(self, sampler: Sampler) -> None:
        """Records what the model writes now."""
        self.settle()
        model = self.whole_model()
        if model is not None:
            self.records.log_sample(self.iter, sampler.write(model, self.iter))

    def _sum_losses(self, windows: Windows, indices: np.ndarray) -> tuple[float, float]:
        """Nats and tokens of these windows, on all ranks together."""
        batches = windows.in_batches(self._mine(indices), self.params.batch_size)
        summed = sum_losses(self.model, batches, self.device, self.dtype)
        nats, tokens = self.ranks.sum(torch.tensor([summed.nats, summed.tokens], dtype=torch.float64)).tolist()
        return nats, tokens

    def check_data(self) -> None:
        """Waits until the token shards are hashed, on every machine. Raises EncoreError on all ranks where one has
        other bytes than the manifest says."""
        if not self._verified:
            if problem := self.ranks.find(self.data.wait()):
                raise EncoreError(problem)
            self._verified = True

    def save(self) -> None:
        """Begins to write a checkpoint of everything that the rest of the run depends on."""
        self.settle()
        self.check_data()
        state = {
            "scaler": self.scaler.state_dict(),
            "code": self.code,
            "last_step": self._last_step,
            "step_seconds": self._step_seconds,
            "first_step_seconds": self._first_step_seconds,
            **self.records.state(),
        }
        self.saver.save(self.iter, self.model, self.optimizers, state)

    def whole_model(self) -> Model | None:
        """The model in one piece, for the first rank; None for the others, which must ask too."""
        if not self.ranks.shards:
            return self.model if self.ranks.is_first else None
        model = make_model(self.model.config) if self.ranks.is_first else None
        places = model.state_dict() if model else {}
        for name, tensor in self.model.state_dict().items():
            whole = gather(tensor)
            if model:
                places[name].copy_(whole)
        return model

    def _mine(self, windows: np.ndarray) -> np.ndarray:
        """This rank's part of the windows of an evaluation. Ranks that share the weights must make the same number of
        passes, so where they cannot share evenly each has them all, which leaves the mean as it is."""
        if self.ranks.shards and len(windows) % self.ranks.count:
            return windows
        return windows[self.ranks.rank :: self.ranks.count]
