"""C++ sources of this package, compiled on the machine where they are used, when they are first used.

A compiled library is kept for the next process, under a name that says all that it depends on.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_VECTORS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"),
}
"""For what torch itself found that the processor can do."""
_COMPILERS = ("c++", "g++", "clang++")
_TOLD = 2000
"""Characters of a compiler's last words."""


def operators(source: Path, namespace: str, what: str, without: str) -> Any:
    """The operators that a source registers.

    Args:
        source: a folder with `operators.cpp`, and with all that it includes but torch's headers.
        namespace: of the operators.
        what: for an error, what asks for them.
        without: for an error, what to do where they cannot be had.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    try:
        torch.ops.load_library(str(library(source, library_folder())))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        output = error.stderr[-_TOLD:] if isinstance(error, subprocess.CalledProcessError) else ""
        raise RuntimeError(
            f"{what}: this could not be compiled, which takes a C++ compiler ({', '.join(_COMPILERS)}, or the one that "
            f"the environment variable CXX names); {without}. ({type(error).__name__}: {error} {output})"
        ) from error
    return getattr(torch.ops, namespace)


def library(source: Path, folder: Path) -> Path:
    """The library of a source in a folder, compiled unless it is there.

    Raises:
        OSError: there is no compiler, or no place for the library.
        CalledProcessError: the compiler fails.
    """
    torch_dir = Path(torch.__file__).parent
    vectors = _VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())
    flags = [*_FLAGS, *vectors, f"-isystem{torch_dir / 'include'}", f"-L{torch_dir / 'lib'}"]
    compiler = _compiler()
    texts = [path.read_text("utf-8") for path in sorted(source.iterdir()) if path.suffix in (".h", ".cpp")]
    parts = (*texts, torch.__version__, sys.platform, *compiler, *flags)
    name = f"{source.name.lstrip('_')}-{sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    made = folder / name
    if not made.exists():
        # Who compiles at the same time writes to another file, and the last one to be ready has its name.
        with tempfile.TemporaryDirectory(dir=folder) as work:
            out = Path(work) / name
            command = [*compiler, *flags, str(source / "operators.cpp"), "-o", str(out), "-ltorch_cpu", "-lc10"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            out.replace(made)
    return made


def library_folder() -> Path:
    """Where libraries are kept: torch's folder for extensions if the user named one, else one in the user's cache.

    Where that cannot be written to, it is a new folder for this process alone.

    Raises:
        OSError: the folder that the user named cannot be made.
    """
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        folder = Path(named)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchimplicit"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # which is that there is no home
        pass
    return Path(tempfile.mkdtemp(prefix="torchimplicit-"))


def _compiler() -> list[str]:
    """The command that compiles C++."""
    if command := os.environ.get("CXX"):
        return shlex.split(command)
    for name in _COMPILERS:
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("none was found")
