"""The MNIST classifier as a `LightningModule`, with its layer's solves in TensorBoard.

pip install 'torchimplicit[train,interop]'
python -m examples.lightning_mnist && tensorboard --logdir runs/lightning
"""

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchimplicit as ti
from examples._digits import sizes
from examples._meter import Meter, parameters
from examples._options import HERE, Options, options, sane
from examples._plot import figure
from examples._record import Experiment, Record
from torchimplicit.experiments.data import Split, load_digits
from torchimplicit.integrations.lightning import LogSolves


class Classifier(pl.LightningModule):
    """784 → 100, `z = tanh(W z + x)`, 100 → 10."""

    def __init__(self, lr: float = 0.1, penalty: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(784, 100)
        self.layer = ti.nn.TanhEquilibrium(100, solver=ti.Anderson(rtol=1e-4), on_failure="ignore")
        self.last = nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.last(self.layer(self.first(images)))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Cross entropy, and the size of the layer's Jacobian if it is asked for."""
        images, labels = batch
        x = self.first(images)
        z = self.layer(x)
        loss = nn.functional.cross_entropy(self.last(z), labels)
        self.log("loss", loss)
        if self.hparams["penalty"]:
            loss = loss + self.hparams["penalty"] * ti.jacobian_penalty(self.layer, z.detach(), x)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """The error in percent."""
        images, labels = batch
        wrong = (self(images).argmax(dim=1) != labels).float().mean()
        self.log("error", 100 * wrong, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


def loader(split: Split, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of 100."""
    images, labels = split.batch(slice(None))
    return DataLoader(TensorDataset(images.flatten(1), labels), batch_size=100, shuffle=shuffle)


EXPERIMENT = Experiment(
    name="lightning_mnist",
    title="The tutorial's layer in Lightning",
    metric="test_error",
    unit="%",
    more_is_better=False,
    ours="Anderson",
    models={"Anderson": ""},
    literature="none: it shows the callback, not a figure; the network is the tutorial's",
    notes=("no twin of its own: the tutorial's has the same layers",),
)


def command_line(argv: Sequence[str] | None = None) -> Options:
    """The options; `--penalty`, the weight of the Jacobian penalty."""
    return options(argv, __doc__ or "", digits=True, smoke={"epochs": 1}, epochs=3, penalty=0.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Train on the digits at hand (TORCHIMPLICIT_DATA: the folder with the four IDX files of the full set)."""
    chosen = command_line(argv)
    digits = load_digits(chosen.data_dir)
    record = Record.open(EXPERIMENT, chosen, data=sizes(digits))
    logs = Path("runs/lightning") if chosen.out == HERE else chosen.out / "lightning"
    curves = []
    for seed in chosen.seeds:
        pl.seed_everything(seed, verbose=False)
        model, meter, errors = Classifier(penalty=chosen.penalty), Meter(), []
        with ti.monitor(model) as log:
            watch = LambdaCallback(
                on_train_batch_end=lambda *_, m=meter, log=log: m.take(log),
                on_validation_batch_end=lambda *_, log=log: log.records.clear(),
                on_validation_epoch_end=lambda trainer, *_, e=errors: e.append(
                    float(trainer.callback_metrics["error"])
                ),
            )
            trainer = pl.Trainer(
                max_epochs=chosen.epochs,
                accelerator="cpu",
                logger=TensorBoardLogger(str(logs)),
                callbacks=[LogSolves(), watch],
                log_every_n_steps=10,
                num_sanity_val_steps=0,
            )
            trainer.fit(model, loader(digits.train, True), loader(digits.test, False))
        record.add("Anderson", seed, test_error=errors[-1], parameters=parameters(model), **meter.figures())
        curves.append(errors)
        sane(chosen, "an error below 40 %", errors[-1] < 40)
    with figure(chosen.out, "lightning_mnist", width=4.5) as axes:
        for errors in curves:
            axes.plot(range(1, len(errors) + 1), errors, "o-")
        axes.set(xlabel="epoch", ylabel="test error, %")


if __name__ == "__main__":
    main()
