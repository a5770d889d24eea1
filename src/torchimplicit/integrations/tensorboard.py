"""What `ti.monitor` collected, as curves in TensorBoard."""

from typing import Protocol

from torchimplicit.diagnostics import Monitor


class Writer(Protocol):
    """As `torch.utils.tensorboard.SummaryWriter` is one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Add a point to a curve."""
        ...


def log_scalars(writer: Writer, log: Monitor, step: int, prefix: str = "implicit/") -> None:
    """Add a point to the curve of each quantity of each layer: `log.scalars(prefix)`.

    ```python
    writer = torch.utils.tensorboard.SummaryWriter("runs")
    for step, (x, y) in enumerate(batches):
        with ti.monitor(model) as log:
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
        log_scalars(writer, log, step)
    ```

    Args:
        writer: a `SummaryWriter`, or whatever has its `add_scalar`.
        log: of the step, its backward pass included.
        step: its number.
        prefix: of the curves' names.
    """
    for name, value in log.scalars(prefix).items():
        writer.add_scalar(name, value, step)
