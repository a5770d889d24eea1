"""A Lightning callback that logs how the implicit layers of a module fared."""

from contextlib import ExitStack
from typing import Any

try:
    import lightning.pytorch as pl
except ImportError as error:  # pragma: no cover
    raise ImportError("torchimplicit.integrations.lightning needs Lightning: pip install lightning") from error

from torchimplicit.diagnostics import Monitor, monitor


class LogSolves(pl.Callback):
    """Logs residuals, steps, failures and evaluations of every implicit layer, forward and backward, by `log_dict`.

    Training batches are logged when they end, as `implicit/<layer>/steps` and so on (see `Monitor.scalars`); how many
    reach the logger is `log_every_n_steps` of the trainer. Validation and test batches are logged with `val_` and
    `test_` in front, averaged over the epoch; but for `failures` and `evaluations`, which are summed, and `residual`,
    of which the largest counts.

    ```python
    trainer = lightning.pytorch.Trainer(callbacks=[LogSolves()])
    ```

    Args:
        prefix: of the names.
    """

    def __init__(self, prefix: str = "implicit/") -> None:
        self.prefix = prefix
        self._open = ExitStack()
        self._log: Monitor | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Begin to collect."""
        self._begin(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Log the batch."""
        scalars = self._end()
        if scalars:
            pl_module.log_dict(scalars)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Begin to collect."""
        self._begin(pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Log the batch."""
        self._log_epoch(pl_module, "val_")

    def on_test_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Begin to collect."""
        self._begin(pl_module)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Log the batch."""
        self._log_epoch(pl_module, "test_")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop collecting."""
        self._end()

    def _begin(self, module: pl.LightningModule) -> None:
        self._end()
        self._log = self._open.enter_context(monitor(module))

    def _end(self) -> dict[str, float]:
        """What was collected; nothing more is."""
        log, self._log = self._log, None
        self._open.close()
        return {} if log is None else log.scalars(self.prefix)

    def _log_epoch(self, module: pl.LightningModule, stage: str) -> None:
        for name, value in self._end().items():
            quantity = name.rpartition("/")[2]
            reduce = {"residual": "max", "failures": "sum", "evaluations": "sum"}.get(quantity, "mean")
            module.log(stage + name, value, on_step=False, on_epoch=True, reduce_fx=reduce)
