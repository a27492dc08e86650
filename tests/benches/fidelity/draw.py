"""Draws the frontier that the fidelity bench measured and prints its table.

usage: draw.py FIGURES.json PLOT.png
"""

import json
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLUMNS = [
    ("bytes a token", "bytes_per_token", "{:.1f}"),
    ("in large shards", "bytes_per_token_large", "{:.1f}"),
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
    online = {run["seed"]: run["kl"] for run in measured["online"]}
    print(f"online: held-out KL {statistics.mean(online.values()):.4f}, seeds "
          + ", ".join(f"{kl:.4f}" for kl in online.values()))
    print("| setting | " + " | ".join(name for name, *_ in COLUMNS) + " | held-out KL against online |")
    print("|---|" + "---|" * (len(COLUMNS) + 1))
    points = []
    for setting in measured["settings"]:
        cells = []
        for _, key, form in COLUMNS:
            value = setting.get(key)
            cells.append("" if value is None else form.format(value))
        ratios = [100 * (run["kl"] / online[run["seed"]] - 1) for run in setting.get("trained", [])]
        if ratios:
            mean, low, high = statistics.mean(ratios), min(ratios), max(ratios)
            cells.append(f"{mean:+.1f} % ({low:+.1f} to {high:+.1f})")
            points.append((setting["name"], setting["bytes_per_token"], mean, low, high))
        else:
            cells.append("")
        print(f"| {setting['name']} | " + " | ".join(cells) + " |")
    print(json.dumps(measured["speed"], indent=1))
    draw(points, plot)


def draw(points, plot):
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    named = []
    for name, size, mean, low, high in points:
        family = name.split("-")[0]
        colour = {"threshold": "C0", "head": "C1", "random": "C2", "top": "C3", "distillkit": "C7"}.get(family, "C5")
        axes.errorbar(size, mean, yerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
        # Two settings of one size would write over each other.
        crowded = any(abs(size - other) < 2 and abs(mean - height) < 0.3 for other, height in named)
        place = (5, -10) if crowded else (5, 5)
        axes.annotate(name, (size, mean), xytext=place, textcoords="offset points", fontsize=8)
        named.append((size, mean))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(25, 600)
    axes.set_xticks([25, 50, 100, 200, 300], ["25", "50", "100", "200", "300"])
    axes.minorticks_off()
    axes.set_xlabel("bytes a target token on disk")
    axes.set_ylabel("held-out KL against training on whole distributions, %")
    axes.set_title("What a student loses to storage: mean and range of three seeds")
    figure.savefig(plot, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
