"""Draws the frontier that the fidelity bench measured and prints its tables.

usage: draw.py FIGURES.json PLOT.png
"""

import json
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SIZES = [
    ("bytes a token", "bytes_per_token", "{:.1f}"),
    ("in large shards", "bytes_per_token_large", "{:.1f}"),
]
KEPT = [
    ("entries", "entries", "{:.1f}"),
    ("mass kept", "mass_kept", "{:.3f}"),
    ("KL of the reconstruction", "reconstruction_kl", "{:.2f}"),
    ("mean error", "mean_error", "{:.3f}"),
    ("99th percentile", "error_p99", "{:.3f}"),
    ("arg-max kept", "argmax_agreement", "{:.3f}"),
    ("gradient bias", "gradient_bias", "{:.3f}"),
    ("gradient variance", "gradient_variance", "{:.4f}"),
]


def main(figures, plot):
    with open(figures) as file:
        measured = json.load(file)
    sizes = {setting["name"]: setting["bytes_per_token"] for setting in measured["settings"]}
    losses = {}
    for student in measured["students"]:
        online = {run["seed"]: run["kl"] for run in student["trained"][measured["online"]]}
        print(f"{student['name']}, online: held-out KL {statistics.mean(online.values()):.4f}, seeds "
              + ", ".join(f"{kl:.4f}" for kl in online.values()))
        losses[student["name"]] = {
            setting: [100 * (run["kl"] / online[run["seed"]] - 1) for run in runs]
            for setting, runs in student["trained"].items() if setting in sizes
        }
    table(measured["settings"], SIZES, losses)
    table(measured["settings"], KEPT, {})
    print(json.dumps(measured["speed"], indent=1))
    draw(losses, sizes, plot)


def table(settings, columns, losses):
    print("\n| setting | " + " | ".join([name for name, *_ in columns] + list(losses)) + " |")
    print("|---|" + "---|" * (len(columns) + len(losses)))
    for setting in settings:
        values = [(setting.get(key), form) for _, key, form in columns]
        cells = ["" if value is None else form.format(value) for value, form in values]
        cells += [loss(of.get(setting["name"])) for of in losses.values()]
        print(f"| {setting['name']} | " + " | ".join(cells) + " |")
    print()


def loss(ratios):
    if not ratios:
        return ""
    return f"{statistics.mean(ratios):+.2f} % ({min(ratios):+.2f} to {max(ratios):+.2f})"


def draw(losses, sizes, plot):
    figure, panels = plt.subplots(len(losses), 1, figsize=(8, 3.6 * len(losses)), sharex=True, layout="constrained")
    for axes, (student, of) in zip(panels, losses.items()):
        named = []
        height = max(max(ratios) for ratios in of.values())
        for name, ratios in of.items():
            size, mean = sizes[name], statistics.mean(ratios)
            family = name.split("-")[0]
            colour = {"threshold": "C0", "head": "C1", "random": "C2", "top": "C3", "distillkit": "C7"}.get(family, "C5")
            spread = [[mean - min(ratios)], [max(ratios) - mean]]
            axes.errorbar(size, mean, yerr=spread, fmt="o", color=colour, capsize=3)
            # Two settings of one size would write over each other.
            crowded = any(abs(size - other) < 2 and abs(mean - beside) < 0.06 * height for other, beside in named)
            place = (5, -10) if crowded else (5, 5)
            axes.annotate(name, (size, mean), xytext=place, textcoords="offset points", fontsize=8)
            named.append((size, mean))
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("held-out KL against online, %")
        axes.set_title(student, fontsize=10)
    panels[-1].set_xscale("log")
    panels[-1].set_xlim(25, 600)
    panels[-1].set_xticks([25, 50, 100, 200, 300], ["25", "50", "100", "200", "300"])
    panels[-1].minorticks_off()
    panels[-1].set_xlabel("bytes a target token on disk")
    figure.suptitle("What a student loses to storage: mean and range over the seeds")
    figure.savefig(plot, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
