"""What solves and trainings cost: evaluations, converged samples, time, memory, parameters."""

import resource
import statistics
import sys
import time

from torch import Tensor, nn

import torchimplicit as ti


class Meter:
    """Counts what solves cost and how many samples converged, from the Solutions it is shown, and the time since."""

    def __init__(self) -> None:
        self.forward: list[int] = []
        self.backward: list[int] = []
        self.converged = self.samples = 0
        self._pending: ti.Solution | None = None
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def see(self, solution: ti.Solution) -> Tensor:
        """Take note of a solve, and when the next comes of its backward pass; returns its value."""
        self._settle()
        self.forward.append(solution.evaluations)
        self.converged += int(solution.converged.sum())
        self.samples += solution.converged.numel()
        self._pending = solution
        return solution.value

    def take(self, log: ti.Monitor) -> None:
        """Take note of all solves that a monitor has seen, their backward passes included, and empty it."""
        for record in log.records:
            self.see(record.solution)
        self._settle()
        log.records.clear()

    def _settle(self) -> None:
        if self._pending is not None and self._pending.adjoint.evaluations is not None:
            self.backward.append(self._pending.adjoint.evaluations)
        self._pending = None

    def solves(self) -> dict[str, float]:
        """Evaluations per batch forward and backward, converged fraction; nothing where nothing was solved."""
        self._settle()
        if not self.forward:
            return {}
        return {
            "evaluations_forward": statistics.fmean(self.forward),
            "evaluations_backward": statistics.fmean(self.backward or [0]),
            "converged": self.converged / self.samples,
        }

    def seconds(self) -> dict[str, float]:
        """Wall and processor time since it was made."""
        return {"wall_s": time.perf_counter() - self._wall, "processor_s": time.process_time() - self._processor}

    def figures(self) -> dict[str, float]:
        """All of that."""
        return self.solves() | self.seconds()


def parameters(*modules: nn.Module) -> int:
    """How many there are."""
    return sum(p.numel() for module in modules for p in module.parameters())


def peak_memory_mb() -> float:
    """The most memory that the process has held, in MB, torch and the data included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
