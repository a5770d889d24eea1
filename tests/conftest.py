"""What every test runs under: one thread per worker, a fixed seed, no display, reproducible random examples in CI."""

import os
import shutil

# Before anything imports them: a test run opens no window, and its workers do not fight over cores.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

torch.set_num_threads(1)
COMPILERS = ("c++", "g++", "clang++")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device, or a C++ compiler, where there is none."""
    skips = {
        "gpu": not torch.cuda.is_available() and pytest.mark.skip(reason="needs a CUDA device"),
        "compiler": not any(map(shutil.which, COMPILERS)) and pytest.mark.skip(reason="needs a C++ compiler"),
    }
    for item in items:
        for name, skip in skips.items():
            if skip and name in item.keywords:
                item.add_marker(skip)
