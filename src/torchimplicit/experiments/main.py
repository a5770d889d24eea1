"""The console script `torchimplicit`: start the command line, or say in one line what to install for it."""

import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich", "matplotlib")


def main() -> None:
    """Entry point; exits with status 1 if the `train` extra is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"torchimplicit: the command line needs {', '.join(missing)}: pip install 'torchimplicit[train]'")
    from torchimplicit.experiments.cli import app

    app(prog_name="torchimplicit")


if __name__ == "__main__":
    main()
