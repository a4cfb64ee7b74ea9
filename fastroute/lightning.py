"""A callback for Lightning that watches the routing of the module it trains. Needs lightning or pytorch_lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "fastroute.lightning needs Lightning: pip install lightning", name="lightning"
        ) from error

from .loggers import RunLog
from .monitor import RoutingMonitor
from .ops.arguments import Count, checked

__all__ = ["RoutingCallback"]


class RoutingCallback(Callback):
    """Logs a :class:`~fastroute.RoutingMonitor`'s numbers to the trainer's loggers.

    In training every ``log_every_n_steps`` of the trainer (or ``every_n_steps``), under ``routing/...``; of validation
    once each time, under ``val_routing/...``. Each process counts its own samples; what is logged is the first one's.

    Args:
        run_dir: also write ``RUN_DIR/routing.jsonl``, for ``fastroute report``, with the trainer's metrics beside.
        every_n_steps: of the optimizers; None: the trainer's ``log_every_n_steps``. The last are logged at the end.
        counts: give how often each module was taken, too.

    Attributes:
        monitor: of training, and of validation while that runs; ``monitor.gradient_conflict`` may be called from
            ``training_step``.
    """

    @checked
    def __init__(
        self, run_dir: str | Path | None = None, *, every_n_steps: Count | None = None, counts: bool = True
    ) -> None:
        super().__init__()
        self.run_dir, self.every_n_steps, self.counts = run_dir, every_n_steps, counts
        self.monitor: RoutingMonitor | None = None
        self._monitors: dict[str, RoutingMonitor] = {}  # of training and of validation, which counts for itself
        self._log: RunLog | None = None
        self._step = 0  # the last one whose training was logged

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin anew: what another run, or another stage, has counted is not this one's."""
        self._stop()
        self._monitors = {}
        if self.run_dir is not None and trainer.is_global_zero:
            self._log = RunLog(self.run_dir)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Watch no more."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Watch no more: Lightning calls no ``teardown`` then."""
        self._stop()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """What was trained before, in a run that goes on, is not logged again."""
        self._step = trainer.global_step
        self._watch("routing", pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, if it is time: once for each optimizer step, with all batches that it came from."""
        every = self.every_n_steps or trainer.log_every_n_steps
        if every and trainer.global_step // every > self._step // every:  # a batch may make several steps
            self._write_training(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the steps since the last line."""
        if trainer.global_step > self._step:
            self._write_training(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Count for validation; training goes on counting where it was."""
        self._watch("val_routing", pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Log validation's numbers, which are not training's."""
        if trainer.sanity_checking and self.monitor is not None:
            self.monitor.reset()
        else:
            self._write(trainer, "val_routing")
        if "routing" in self._monitors:  # validation within training
            self._watch("routing", pl_module)

    def _watch(self, prefix: str, pl_module: Any) -> None:
        """What is counted from now on is logged under the prefix."""
        self._stop()
        if prefix not in self._monitors:
            self._monitors[prefix] = RoutingMonitor(pl_module, counts=self.counts)
        self.monitor = self._monitors[prefix].attach()

    def _stop(self) -> None:
        if self.monitor is not None:
            self.monitor.remove()

    def _write_training(self, trainer: Any) -> None:
        self._step = trainer.global_step
        self._write(trainer, "routing")

    def _write(self, trainer: Any, prefix: Literal["routing", "val_routing"]) -> None:
        if self.monitor is None:
            return
        numbers = self.monitor.numbers()
        if not numbers or not trainer.is_global_zero:
            return
        step = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics({f"{prefix}/{name}": value for name, value in numbers.items()}, step)
        if self._log is not None:
            mine = {name: float(value) for name, value in trainer.callback_metrics.items()}
            if prefix == "val_routing":
                numbers = {f"val/{name}": value for name, value in numbers.items()}
            self._log.write({**mine, **numbers}, step)
