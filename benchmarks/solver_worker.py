"""One attempt under a time limit: in a process of its own, which outlives it unless it has to be killed."""

import contextlib
import multiprocessing
import os
import time
import warnings
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.problems import PROBLEMS
from benchmarks.solver_claim import Attempt, Method, judge

START_LIMIT = 120.0
"""Seconds that a new process may take to import what it needs."""

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}


def all_methods() -> dict[str, Method]:
    """List every method by name."""
    from benchmarks.solver_ours import ours
    from benchmarks.solver_peers import PEERS

    return {method.name: method for method in (*ours(), *PEERS)}


def find_method(name: str) -> Method:
    """Find a method by name; a peer without touching what is ours."""
    from benchmarks.solver_peers import PEERS

    peers = {method.name: method for method in PEERS}
    return peers[name] if name in peers else all_methods()[name]


def attempt(method: Method, problem_name: str) -> Attempt:
    """Let a method try a problem, here and now."""
    problem = PROBLEMS[problem_name]
    blank = Attempt(method.name, problem_name, "raised")
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            claim = method.solve(problem)
    except ImportError as error:
        return replace(blank, outcome="unavailable", detail=_told(error))
    except Exception as error:
        return replace(blank, detail=_told(error), seconds=time.perf_counter() - began)
    seconds = time.perf_counter() - began
    return replace(blank, **judge(problem, claim), seconds=seconds)


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _serve(pipe: Connection, method_name: str) -> None:
    """Answer problem names with attempts until the pipe closes; whatever a method prints is dropped.

    The first message is empty, or says why there will be no others.
    """
    import torch

    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        method = find_method(method_name)
    except Exception as error:
        pipe.send(_told(error))
        return
    pipe.send("")
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(attempt(method, pipe.recv()))


class NotStartedError(RuntimeError):
    """A process for attempts could not be made ready."""


class Worker:
    """Runs the attempts of one method; one that exceeds the limit costs its process, and the next gets a new one."""

    def __init__(self, method: str, limit: float) -> None:
        self._method = method
        self._limit = limit
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def attempt(self, problem: str) -> Attempt:
        """Try a problem; the outcome is "timeout" past the limit, "raised" if the process died of it.

        Raises:
            NotStartedError: if there is no process to try it in, which says nothing about the method.
        """
        if self._process is None:
            self._start()
        lost = Attempt(self._method, problem, "timeout", seconds=self._limit)
        try:
            self._pipe.send(problem)
            if self._pipe.poll(self._limit):
                return self._pipe.recv()
        except (EOFError, OSError):
            lost = replace(lost, outcome="raised", seconds=None, detail="its process died")
        self._stop()
        return lost

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(far_end, self._method), daemon=True)
        self._process.start()
        far_end.close()
        try:
            failure = self._pipe.recv() if self._pipe.poll(START_LIMIT) else f"nothing heard for {START_LIMIT:g} s"
        except (EOFError, OSError):
            failure = "it died while importing"
        if failure:
            self._stop()
            raise NotStartedError(f"{self._method}: its process did not start: {failure}")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None
