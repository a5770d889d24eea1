"""The command line that all examples have: seeds, threads, where the results go, and a reduced setting."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SMOKE = Path("runs/smoke")


class Options(argparse.Namespace):
    """What was chosen; `settings` are the options that tell one experiment from another."""

    seeds: list[int]
    smoke: bool
    data_dir: Path | None
    out: Path
    settings: dict[str, Any]


def options(
    argv: Sequence[str] | None,
    description: str,
    *,
    smoke: dict[str, Any],
    twin: bool = False,
    digits: bool = False,
    which: tuple[str, ...] = (),
    **settings: Any,
) -> Options:
    """Read `--seeds 0 1 2`, `--threads`, `--out`, `--smoke`, and `--NAME` for every further keyword, with its default.

    Args:
        argv: the arguments; None, those of the process.
        description: of the script.
        smoke: what `--smoke` has in the place of the defaults: a setting of seconds.
        twin: whether there is `--twin`, which trains the explicit network instead.
        digits: whether there is `--data-dir`, for other digits than the 5,000 embedded ones.
        which: a first argument that chooses between these models.
        settings: the default of each option of the experiment; a tuple, a choice between its members.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--threads", type=int, default=1, help="default: 1; small models gain nothing from more")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes, and a check of the outcome")
    parser.add_argument("--out", type=Path, help=f"folder of results/ and plots/; default: examples, or {SMOKE}")
    if which:
        parser.add_argument("model", choices=which, nargs="?", default=which[0], help=f"default: {which[0]}")
    if digits:
        parser.add_argument("--data-dir", type=Path, help="IDX files; default: TORCHIMPLICIT_DATA, or 5,000 digits")
    if twin:
        parser.add_argument("--twin", action="store_true", help="train the explicit network instead")
    for name, default in settings.items():
        choices, first = (default, default[0]) if isinstance(default, tuple) else (None, default)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(first), choices=choices, default=first, help=f"default: {first}")
    chosen = parser.parse_args(argv, Options())
    if chosen.smoke:
        parser.set_defaults(seeds=[0], **smoke)
        chosen = parser.parse_args(argv, Options())
    chosen.out = chosen.out or (SMOKE if chosen.smoke else HERE)
    chosen.settings = {name: getattr(chosen, name) for name in settings}
    torch.set_num_threads(chosen.threads)
    return chosen


def sane(chosen: Options, what: str, holds: bool) -> None:
    """In the reduced setting: say whether what must hold does, and stop if it does not."""
    if chosen.smoke:
        print(f"sane: {what}" if holds else f"NOT SANE: expected {what}", flush=True)
        assert holds, f"expected {what}"
