"""Deblurring digits by a learned proximal gradient, iterated to its fixed point: `python -m examples.deblur`.

The observation is `y = A z + noise` with a Gaussian blur A. A step of the learned proximal gradient is
`z ← R(z − η Aᵀ(A z − y))` with a small convolutional network R in the place of the proximal map (deep equilibrium
models for inverse problems; Gilton, Ongie & Willett 2021, "DE-Prox"). Three trainings of the same map: at its fixed
point with the exact gradient, at its fixed point with the one-step gradient, and unrolled for 10 steps. Then each is
iterated on: what was trained for 10 steps need not be any good after 100, a fixed point stays where it is.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchimplicit as ti
from examples._digits import batches, sizes
from examples._meter import Meter, parameters
from examples._options import Options, options, sane
from examples._plot import plt, save
from examples._progress import progress
from examples._record import Experiment, Record
from torchimplicit.experiments.data import Split, load_digits

NOISE = 0.02
STEPS = 10


def gaussian(deviation: float = 1.5, reach: int = 4) -> Tensor:
    """The kernel of the blur, `(1, 1, 9, 9)`, of sum 1: symmetric, so that A = Aᵀ with zeros around the image."""
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    kernel = line[:, None] * line
    return (kernel / kernel.sum())[None, None]


class ProximalStep(nn.Module):
    """`R(z − η Aᵀ(A z − y))` with `R(u) = a u + N(u)`, and N a network of three convolutions that begins at zero.

    With a = 0.9 the first map contracts, since ‖I − η AᵀA‖ ≤ 1; afterwards it is for the training to keep it so.
    """

    samplewise = True

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.register_buffer("kernel", gaussian())
        self.step = nn.Parameter(torch.tensor(1.0))
        self.keep = nn.Parameter(torch.tensor(0.9))
        self.inward = nn.Conv2d(1, width, 3, padding=1)
        self.across = nn.Conv2d(width, width, 3, padding=1)
        self.outward = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def blur(self, z: Tensor) -> Tensor:
        """`A z`, which is `Aᵀ z` too."""
        return functional.conv2d(z, self.kernel, padding=self.kernel.shape[-1] // 2)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """`(B, 1, H, W)` and the observations to the next iterate."""
        u = z - self.step * self.blur(self.blur(z) - y)
        inner = functional.relu(self.across(functional.relu(self.inward(u))))
        return self.keep * u + self.outward(inner)

    def observe(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Blurred and with noise."""
        return self.blur(images) + NOISE * torch.randn(images.shape, generator=generator)

    def start(self, y: Tensor) -> Tensor:
        """Where the iteration begins: the observation itself."""
        return y

    def unrolled(self, y: Tensor, steps: int) -> Tensor:
        """So many plain steps."""
        z = self.start(y)
        for _ in range(steps):
            z = self(z, y)
        return z


def equilibrium(step: ProximalStep, adjoint: ti.Adjoint) -> ti.nn.FixedPoint:
    """The step at its fixed point; training takes what 60 steps reach.

    The tolerance is small because the contraction is slow: at a rate of 0.95 and more, a residual of 1e-3 leaves an
    error 20 times as large, and the network would be trained for where the solver stops, not for the fixed point.
    """
    solver = ti.Anderson(rtol=1e-4)
    return ti.nn.FixedPoint(step, solver=solver, adjoint=adjoint, init=step.start, max_steps=60, on_failure="ignore")


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image of values in [0, 1], in decibels, `(B,)`."""
    return -10 / math.log(10) * (image - truth).square().flatten(1).mean(1).log()


def train(
    step: ProximalStep, adjoint: ti.Adjoint | None, data: Split, steps: int, seed: int, label: str
) -> dict[str, float]:
    """Adam on the squared error, at the fixed point or, without an adjoint, after 10 steps."""
    generator = torch.Generator().manual_seed(seed)
    peak, size, done = 4e-3, 16, 0
    optimiser = torch.optim.Adam(step.parameters(), peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=steps, pct_start=0.2)
    layer = None if adjoint is None else equilibrium(step, adjoint)
    meter = Meter()
    with progress(label, steps) as advance:
        while done < steps:
            for images, _ in batches(data, size, generator):
                y = step.observe(images, generator)
                z = step.unrolled(y, STEPS) if layer is None else meter.see(layer.solve(y))
                loss = functional.mse_loss(z, images)
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(step.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                done += 1
                advance(f"PSNR {-10 * loss.log10().item():.2f}")
                if done == steps:
                    break
    solves = meter.solves() or {"evaluations_forward": STEPS, "evaluations_backward": STEPS}
    return solves | meter.seconds()


@torch.no_grad()
def test(step: ProximalStep, images: Tensor, implicit: bool) -> tuple[Tensor, dict[str, float]]:
    """Restored images, and the PSNR as trained, and when iterated 10 times as long (plain steps)."""
    y = step.observe(images, torch.Generator().manual_seed(99))
    if not implicit:
        z, longer = step.unrolled(y, STEPS), step.unrolled(y, 10 * STEPS)
        return z, {"psnr": psnr(z, images).mean().item(), "psnr_10_times_as_long": psnr(longer, images).mean().item()}
    layer = equilibrium(step, ti.JacobianFree())
    layer.max_steps = 300
    solution = layer.solve(y)
    steps = int(solution.steps.max())
    # On from the solution by the map itself: what 10 times the steps do to it.
    longer = solution.value
    for _ in range(9 * steps):
        longer = step(longer, y)
    return solution.value, {
        "psnr": psnr(solution.value, images).mean().item(),
        "psnr_10_times_as_long": psnr(longer, images).mean().item(),
        "converged": solution.converged.double().mean().item(),
        "evaluations_test": solution.evaluations,
    }


def plot(out: Path, truth: Tensor, y: Tensor, restored: dict[str, Tensor], paths: dict[str, list[float]]) -> None:
    """Some digits, and the PSNR over the steps."""
    pictures = {"truth": truth, "observed": y} | restored
    figure = plt.figure(figsize=(10, 4))
    left, right = figure.subfigures(1, 2, width_ratios=(1.2, 1))
    axes = left.subplots(len(pictures), 6)
    for line, (name, images) in zip(axes, pictures.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for one, image in zip(line, images[:, 0], strict=False):
            one.imshow(image.clamp(0, 1), cmap="gray")
            one.set(xticks=[], yticks=[])
    curve = right.subplots()
    for name, values in paths.items():
        curve.plot(range(len(values)), values, label=name)
    curve.axvline(STEPS, color="gray", lw=0.5)
    curve.set(xlabel="plain steps from the observation", ylabel="PSNR, dB", ylim=(10, None))
    curve.legend(fontsize=8)
    save(figure, out, "deblur")


@torch.no_grad()
def path(step: ProximalStep, images: Tensor, steps: int = 100) -> list[float]:
    """The PSNR after each plain step."""
    y = step.observe(images, torch.Generator().manual_seed(99))
    z, found = step.start(y), []
    for _ in range(steps):
        found.append(psnr(z, images).mean().item())
        z = step(z, y)
    return found


MODELS: dict[str, tuple[ti.Adjoint | None, str]] = {
    "equilibrium, exact gradient": (
        ti.Implicit(linear_solver=ti.GMRES(), rtol=3e-2),
        "Gilton, Ongie & Willett 2021: at least the unrolled network's, and stays when iterated on",
    ),
    "equilibrium, one-step gradient": (ti.JacobianFree(), "arXiv 2511.18667: below the exact gradient's"),
    "unrolled, 10 steps": (None, "Gilton, Ongie & Willett 2021: falls when iterated on"),
}


EXPERIMENT = Experiment(
    name="deblur",
    title="Deblurring digits",
    metric="psnr",
    unit="dB",
    ours="equilibrium, exact gradient",
    twin="unrolled, 10 steps",
    models={name: literature for name, (_, literature) in MODELS.items()},
    literature="DE-Prox at least the unrolled network's PSNR, and it stays when iterated on",
    source="Gilton, Ongie & Willett 2021",
    notes=(
        "blur of deviation 1.5 pixels, noise 0.02; batches of 16; PSNR is the mean over images, in decibels; "
        "psnr_observed: that of the blurred images",
        "psnr_10_times_as_long: after 100 plain steps for the unrolled network; for the equilibria after 9 times as "
        "many plain steps as the solve took, from its solution",
    ),
)


def command_line(argv: Sequence[str] | None = None) -> Options:
    """The options; `--steps` of training."""
    smoke = {"steps": 20, "test_images": 20}
    return options(argv, __doc__ or "", digits=True, smoke=smoke, steps=200, test_images=200)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the three, test, write."""
    chosen = command_line(argv)
    data = load_digits(chosen.data_dir)
    images = data.test.batch(slice(0, None, max(1, len(data.test) // chosen.test_images)))[0][:, None]
    record = Record.open(EXPERIMENT, chosen, data=sizes(data))
    for seed in chosen.seeds:
        restored, paths = {}, {}
        for name, (adjoint, _) in MODELS.items():
            torch.manual_seed(seed)
            step = ProximalStep()
            y = step.observe(images, torch.Generator().manual_seed(99))
            observed = psnr(y, images).mean().item()
            cost = train(step, adjoint, data.train, chosen.steps, seed, f"{name}, seed {seed}")
            restored[name], tested = test(step, images, adjoint is not None)
            paths[name] = path(step, images)
            record.add(name, seed, **cost | tested, psnr_observed=observed, parameters=parameters(step))
            sane(chosen, "restored images better than the observed ones by 1 dB", tested["psnr"] > observed + 1)
        plot(chosen.out, images, y, restored, paths)


if __name__ == "__main__":
    main()
