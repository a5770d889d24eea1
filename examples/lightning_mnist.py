"""The MNIST classifier as a `LightningModule`, with its layer's solves in TensorBoard.

pip install 'torchimplicit[train,interop]'
python examples/lightning_mnist.py --epochs 3 && tensorboard --logdir runs/lightning
"""

import argparse

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchimplicit as ti
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


def main() -> None:
    """Train on the digits at hand (TORCHIMPLICIT_DATA: the folder with the four IDX files of the full set)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--penalty", type=float, default=0.0, help="weight of the Jacobian penalty")
    parser.add_argument("--out", default="runs/lightning")
    options = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    digits = load_digits(None)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(options.out),
        callbacks=[LogSolves()],
        log_every_n_steps=10,
    )
    trainer.fit(Classifier(penalty=options.penalty), loader(digits.train, True), loader(digits.test, False))


if __name__ == "__main__":
    main()
