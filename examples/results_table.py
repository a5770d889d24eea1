"""Write `examples/RESULTS.md` from the recorded results: `python -m examples.results_table`.

All of it comes from `results/*.json` and `plots/*.png`: nothing is run. What is missing is said to be.
"""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from examples._record import MADE, STANDARD

HERE = Path(__file__).parent
ORDER = (
    "tutorial",
    "residual_mnist",
    "residual_fashion",
    "backward_pareto",
    "deblur",
    "mondeq_fc",
    "mondeq_conv",
    "certified",
    "graph_chains",
    "parity",
    "copy_memory",
    "bratu",
    "market",
    "lightning_mnist",
)
MISSING = {
    "residual_fashion": "It needs Fashion-MNIST: Debian's `dataset-fashion-mnist`, or its four IDX files in a folder: "
    "`python -m examples.residual_deq --name fashion [--data-dir FOLDER]`.",
}
HEADINGS = ("parameters", "evaluations forward", "backward", "converged", "wall, s", "processor, s", "peak, MB")
INTRODUCTION = """# Results of the examples

Made by `make examples-results` from [results](results); do not edit. Each figure is a mean over the seeds, ± their
standard deviation. Evaluations are those of a batch: of the function forward, products with its Jacobian backward.
"Converged" is the share of the samples whose residual, evaluated again, is within the tolerance. Times are of one
run; wall times were taken on a machine that did other things as well, processor times are the process's own. Peak
memory is the process's up to then, torch and the data included. The explicit twin has layers in the place of the
equilibrium, as many parameters if not said otherwise. "–": not recorded, or there is no such thing.

"60000 + 10000" digits are the full MNIST (`TORCHIMPLICIT_DATA` names the folder with its IDX files), "4000 + 1000" the
ones that come with the extra `[train]`.
"""


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The recorded results by name, in the order of the page; those it does not know come last."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    names = [*(n for n in ORDER if n in found), *(n for n in found if n not in ORDER)]
    return {name: found[name] for name in names}


def number(value: float) -> str:
    """Four digits, a large one with its thousands apart."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def in_unit(value: float, unit: str) -> str:
    """The metric as it is read: a fraction in percent."""
    if unit in ("fraction", "%"):
        return f"{100 * value if unit == 'fraction' else value:.2f} %"
    return f"{value:.2f} {unit}" if unit else f"{value:.3g}"


def spread(runs: list[dict[str, Any]], key: str, unit: str | None = None) -> str:
    """Mean ± standard deviation of the runs that have it."""
    values = [r[key] for r in runs if isinstance(r.get(key), int | float)]
    if not values:
        return "–"
    show = number if unit is None else lambda value: in_unit(value, unit)
    text, deviation = show(fmean(values)), stdev(values) if len(values) > 1 else 0.0
    if not deviation:
        return text
    width = f"{100 * deviation if unit == 'fraction' else deviation:.2g}"
    return f"{text} ± {width}" if unit not in ("fraction", "%") else f"{text[:-2]} ± {width} %"


def runs_of(result: dict[str, Any], model: str | None) -> list[dict[str, Any]]:
    """The runs of a model; none where it was not run."""
    return result["models"].get(model, {"runs": []})["runs"]


def verdict(result: dict[str, Any]) -> str:
    """Whether the mean reaches the literature's figure."""
    ours = runs_of(result, result["ours"])
    if result["bar"] is None or not ours:
        return "no comparable figure"
    mean = fmean(r[result["metric"]] for r in ours)
    met = mean >= result["bar"] if result["more_is_better"] else mean <= result["bar"]
    return "met" if met else "**missed**"


def beside_the_twin(result: dict[str, Any]) -> str:
    """Better or worse than the explicit twin; equal where the means are within the larger standard deviation."""
    metric = result["metric"]
    both = [[r[metric] for r in runs_of(result, result[role])] for role in ("ours", "twin")]
    if not all(both):
        return "–"
    gap = fmean(both[0]) - fmean(both[1])
    if abs(gap) <= max(stdev(values) if len(values) > 1 else 0.0 for values in both):
        return "equal within a deviation"
    return "better" if (gap > 0) == result["more_is_better"] else "**worse**"


def shape(result: dict[str, Any]) -> list[str]:
    """Of the backward passes: how much cheaper than the exact one, beside the literature, and at what loss."""
    exact, asked = result["models"]["exact"]["runs"], {"5 refinements": 2.4, "2 refinements": 3.9, "one step": 16.0}
    said = []
    for model, ratio in asked.items():
        runs = runs_of(result, model)
        if runs:
            times, points = (
                [fmean(r[key] for r in some) for some in (exact, runs)] for key in ("backward_ms", "accuracy")
            )
            found = times[0] / times[1]
            said.append(
                f"{model}: {found:.1f} times less backward time than exact (the literature's ratio, {ratio:g}: "
                f"{'met' if found >= ratio else '**missed**'}), {points[1] - points[0]:+.2f} points of accuracy"
            )
    return said


def lacking(result: dict[str, Any]) -> list[str]:
    """What the record does not have and should."""
    said = []
    if result["twin"] is None:
        said.append("there is no explicit twin")
    elif not runs_of(result, result["twin"]):
        said.append("the explicit twin has not been run")
    for name, model in result["models"].items():
        if (count := len(model["runs"])) < 3:
            said.append(f"{name}: {count} seed{'s' * (count > 1)} of 3")
    ours = runs_of(result, result["ours"])
    absent = [HEADINGS[i] for i, key in enumerate(STANDARD) if spread(ours, key) == "–"]
    if absent:
        said.append(f"not recorded of {result['ours']}: {', '.join(absent)}")
    return said


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def summary(results: dict[str, dict[str, Any]]) -> str:
    """One line for each example."""
    rows = []
    for name, r in results.items():
        metric, unit, ours = r["metric"], r["unit"], runs_of(r, r["ours"])
        literature = f"{r['literature']}; {r['source']}" if r["source"] else r["literature"]
        twin = spread(runs_of(r, r["twin"]), metric, unit)
        ours_text = f"{spread(ours, metric, unit)} ({len(ours)})"
        line = [f"[{r['title']}](#{name})", metric, ours_text, twin, beside_the_twin(r), literature, verdict(r)]
        rows.append(line)
    head = ("example", "figure", "ours (seeds)", "explicit twin", "ours is", "literature", "its figure is")
    return table(head, rows)


def section(name: str, r: dict[str, Any], plots: Path) -> str:
    """All of one example."""
    metric, unit = r["metric"], r["unit"]
    every = [run for model in r["models"].values() for run in model["runs"]]
    parts = [f'<a id="{name}"></a>\n\n## {r["title"]}\n']
    said = [f"Literature: {r['literature']}" + (f" ({r['source']})." if r["source"] else ".")]
    said.append(f"Bar: {in_unit(r['bar'], unit)}, {verdict(r)}." if r["bar"] is not None else "")
    parts.append(" ".join(filter(None, said)) + "\n")
    rows = []
    for model, entry in r["models"].items():
        runs = entry["runs"]
        role = " (ours)" if model == r["ours"] else " (twin)" if model == r["twin"] else ""
        costs = [spread(runs, key) for key in STANDARD]
        rows.append([model + role, f"{spread(runs, metric, unit)} ({len(runs)})", *costs, entry["literature"] or "–"])
    parts.append(table(("model", f"{metric} (seeds)", *HEADINGS, "literature"), rows))
    known = {metric, "seed", *STANDARD, *MADE}
    keys = [k for k in dict.fromkeys(k for run in every for k in run) if k not in known]
    keys = [k for k in keys if any(isinstance(run.get(k), int | float) for run in every)]
    if keys:
        rows = [[m, *(spread(entry["runs"], k) for k in keys)] for m, entry in r["models"].items()]
        parts.append(table(("model", *keys), rows))
    for title, figures in r.get("more", {}).get("what_goes_wrong", {}).items():
        parts.append(f"- {title}: " + "; ".join(f"{k} {number(v)}" for k, v in figures.items()))
    each = [f"{m} {', '.join(number(run[metric]) for run in entry['runs'])}" for m, entry in r["models"].items()]
    parts.append(f"- {metric} of each seed: {'; '.join(each)}")
    notes = [*r["notes"], *dict.fromkeys(run["note"] for run in every if "note" in run)]
    notes += shape(r) if name == "backward_pareto" else []
    missing = lacking(r)
    parts += [f"- {note}" for note in notes]
    parts += [f"- Missing: {'; '.join(missing)}."] if missing else []
    settings = ", ".join(f"{key} {value}" for key, value in r["settings"].items())
    dates = " to ".join(dict.fromkeys((min(run["date"] for run in every), max(run["date"] for run in every))))
    versions = "; ".join(dict.fromkeys(", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in every))
    threads = ", ".join(dict.fromkeys(str(run["threads"]) for run in every))
    parts.append(f"- Settings: {settings}. {dates}; {versions}; {threads} thread(s). Figures: [{name}.json]")
    parts[-1] += f"(results/{name}.json).\n"
    commands = dict.fromkeys(run["command"] for run in every)
    parts.append("```sh\n" + "\n".join(commands) + "\n```\n")
    if (plots / f"{name}.png").exists():
        parts.append(f"![{r['title']}](plots/{name}.png)\n")
    else:
        parts.append("There is no plot.\n")
    return "\n".join(parts)


def render(folder: Path = HERE) -> str:
    """The page."""
    results = load(folder / "results")
    parts = [INTRODUCTION, summary(results)]
    absent = [name for name in ORDER if name not in results]
    if absent:
        parts.append("Without a recorded run:\n")
        parts.append("\n".join(f"- `{n}`: {MISSING.get(n, 'it has not been run.')}" for n in absent) + "\n")
    parts += [section(name, result, folder / "plots") for name, result in results.items()]
    return "\n".join(parts)


if __name__ == "__main__":
    (HERE / "RESULTS.md").write_text(render())
    print(f"wrote {HERE / 'RESULTS.md'}")
