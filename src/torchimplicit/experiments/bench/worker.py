"""The process that a row is measured in: one core, one thread, nothing measured before it."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchimplicit.experiments.bench.row import Settings
from torchimplicit.experiments.files import to_json

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_X64": "0",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "EQX_ON_ERROR": "nan",  # a linear solve of lineax that fails says so in its value, not by an exception
}
"""Has to be set before the libraries are imported, so by whoever starts the process."""


def settings_to_json(settings: Settings) -> str:
    """For the command line of the process."""
    told: dict[str, Any] = dataclasses.asdict(settings)
    told["data_dir"] = str(settings.data_dir) if settings.data_dir else None
    return json.dumps(told)


def settings_from_json(text: str) -> Settings:
    """And back."""
    told = json.loads(text)
    folder = told.pop("data_dir")
    return Settings(**told, data_dir=Path(folder) if folder else None)


def stay_on_one_core() -> None:
    """Pin the process to the last of the cores it may use, where the system lets it."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def main(arguments: Sequence[str]) -> int:
    """Measure the row of a name and write the measurement to a file: NAME SETTINGS FILE."""
    name, settings, file = arguments
    stay_on_one_core()
    import torch

    from torchimplicit.experiments.bench.registry import find

    torch.set_num_threads(1)
    measurement = find(name).measure(settings_from_json(settings))
    Path(file).write_text(to_json(dataclasses.asdict(measurement)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
