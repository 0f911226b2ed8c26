"""Does removal help where the paper measured it? The most harmful removed, the last epoch replayed, held-out data.

Terashita et al. (ICLR 2021, section 5.2) trace influence over the last epoch, remove a part of the training instances,
replay that epoch without them, and judge the generator on test data that neither training nor influence has seen.
Published with 50,000 MNIST images (20 epochs) or points (70 epochs), means over 15 seeds: see `PUBLISHED`. The effects
are about as large as their spread over seeds: every cell is a paired comparison with no removal and with random removal
of as many, and says whether the 95% interval of the improvement lies above zero. In the replay, the discriminator's
mean is over the instances that remain in a batch.

Here: 10,000 points of the 2-D normal distribution; 1,079 digits of 8 × 8 to train on and 359 each for influence and
test; Fashion-MNIST at 28 × 28 or at 8 × 8 ("fashion8"), 10,000 images where ``--root`` says where the complete data set
lies, else the package's 2,000, with the test images halved; float32. Each seed has its own initial weights, and for the
digits its own split. A finished row (data, pair, seed) is written to the file of ``--json`` at once and not computed
again.

    python -m benchmarks.reproduction_cleansing [--data normal digits fashion fashion8] [--pair paper modern]
        [--seeds 0 1 2 ...] [--trained-epochs 50] [--last-epochs 1] [--lr LR] [--quick] [--root DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product

import numpy as np
import torch

from benchmarks.paper_networks import PAIRS, networks, trainer
from benchmarks.reproduction_accuracy import DATA, metrics_for, split
from benchmarks.resumable import Rows
from ganclean import GANInfluence
from ganclean.backends import ITD
from ganclean.validation import cleansing_curve, paired_comparison

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
BASELINES = ("discriminator_loss", "isolation_forest", "density", "random")
# Changes against no removal at these rates; of the log-likelihood, times 100, what can be read off up to 10%.
PUBLISHED = {
    ("fid", "influence:fid"): (-0.10, -0.13, -0.18, -0.19, -0.25, -0.36, -0.38, -0.38, -0.23, 0.23),
    ("fid", "influence:is"): (-0.07, -0.10, -0.14, -0.14, -0.26, -0.32, -0.34, -0.36, -0.22, 0.17),
    ("fid", "discriminator_loss"): (-0.03, -0.04, -0.07, -0.13, -0.18, -0.20, -0.19, -0.15, -0.06, 0.34),
    ("fid", "isolation_forest"): (0.01, 0.02, 0.05, 0.10, 0.24, 0.42, 0.73, 1.09, 2.56, 6.99),
    ("fid", "random"): (-0.02, -0.01, -0.01, -0.02, -0.01, 0.00, 0.00, -0.02, -0.08, -0.14),
    ("is", "influence:is"): (0.04, 0.04, 0.05, 0.04, 0.08, 0.11, 0.12, 0.14, 0.09, -0.07),
    ("log_likelihood", "influence:log_likelihood"): (0.0008, 0.0015, 0.0030, 0.0040),
}


def three_parts(data: str, seed: int, root: str | None):
    """Return training data, their labels, validation and test data."""
    X, y, held_out = split(data, seed, root)
    if data == "digits":
        X, y, held_out = X[:1079], y[:1079], np.concatenate([X[1079:], held_out])
    if data == "normal":
        rng = np.random.default_rng(10_000 + seed)
        return X, y, held_out, rng.multivariate_normal([1, 1], [[1, 0.8], [0.8, 1]], size=1_000)
    half = len(held_out) // 2
    return X, y, held_out[:half], held_out[half:]


def trial(data: str, pair: str, seed: int, args: argparse.Namespace) -> dict:
    """Return one seed's metrics on the test data, without removal and after each selector's removals."""
    X, y, X_val, X_test = three_parts(data, seed, args.root)
    metrics = metrics_for(X, y)
    cleanser = GANInfluence(
        *networks(pair, X.shape[1:], seed),
        trainer=trainer(pair, X.shape[1:], args.trained_epochs, args.lr),
        metric=metrics,
        backend=ITD(last_epochs=args.last_epochs, delta=args.delta),
        random_state=seed,
    ).fit(X, X_val=X_val)
    first, *others = metrics
    curve = cleansing_curve(
        cleanser,
        X_test,
        args.rates,
        selectors=("influence", *(f"influence:{name}" for name in others), *BASELINES),
        metrics=metrics,
        n_seeds=1,
        last_epochs=args.last_epochs,
    )
    return {
        "rates": curve.rates.tolist(),
        "baseline": {name: float(curve.baseline[name][0]) for name in metrics},
        "values": {
            name: {
                f"influence:{first}" if selector == "influence" else selector: found[0].tolist()
                for selector, found in curve.values[name].items()
            }
            for name in metrics
        },
        "greater_is_better": {name: metric.greater_is_better for name, metric in metrics.items()},
    }


def table(rows: list[dict], metric: str) -> str:
    """Return changes against no removal, mean (s.d.), as a table in Markdown.

    A * marks an improvement on no removal, a † one on random removal, each where its 95% interval lies above zero; a ×
    a change for the worse of that kind. Each cell stands for itself: nothing is corrected for their number.
    """
    sign = 1 if rows[0]["greater_is_better"][metric] else -1
    baseline = np.array([row["baseline"][metric] for row in rows])
    selectors = list(rows[0]["values"][metric])
    values = {name: np.array([row["values"][metric][name] for row in rows]) for name in selectors}
    rates = rows[0]["rates"]
    ddof = len(rows) > 1
    lines = [
        f"{metric}, without removal {baseline.mean():.4g} ({baseline.std(ddof=ddof):.2g}), {len(rows)} seeds",
        "| removed | " + " | ".join(f"{rate:.0%}" for rate in rates) + " |",
        "| --- |" + " --- |" * len(rates),
    ]
    for name in selectors:
        cells = []
        for i in range(len(rates)):
            change = values[name][:, i] - baseline
            cells.append(f"{change.mean():+.3g} ({change.std(ddof=ddof):.2g}){marks(sign, change, values, name, i)}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        published = PUBLISHED.get((metric, name))
        if published and len(rates) == len(RATES):
            cells = [f"{value:+.3g}" for value in published] + ["–"] * (len(rates) - len(published))
            lines.append(f"| published, {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def marks(sign: int, change: np.ndarray, values: dict[str, np.ndarray], name: str, i: int) -> str:
    """Return the signs of what is significant over the seeds."""
    if len(change) < 2:
        return ""
    against_none = paired_comparison(sign * change)
    text = " *" if against_none.low > 0 else " ×" if against_none.high < 0 else ""
    if name != "random":
        text += " †" * (paired_comparison(sign * (values[name][:, i] - values["random"][:, i])).low > 0)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, nargs="*", default=["digits"])
    parser.add_argument("--pair", choices=PAIRS, nargs="*", default=list(PAIRS))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(15)))
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    parser.add_argument("--trained-epochs", type=int, default=50)
    parser.add_argument("--last-epochs", type=int, default=1)
    parser.add_argument("--delta", type=float, default=1e-2, help="relative width of the secant")
    parser.add_argument("--lr", type=float, help="in place of the pair's own learning rate")
    parser.add_argument("--root", help="folder of the complete Fashion-MNIST, as torchvision finds it")
    parser.add_argument("--quick", action="store_true", help="2 seeds of 5 epochs, 3 rates")
    parser.add_argument("--json", help="results; rows that it holds are not computed again")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.trained_epochs, args.rates = [0, 1], 5, (0.05, 0.2, 0.5)
    torch.set_num_threads(1)
    rows = Rows(args.json)
    for data, pair in product(args.data, args.pair):
        settings = {name: vars(args)[name] for name in ("trained_epochs", "last_epochs", "delta", "lr")}
        settings |= {"data": data, "pair": pair, "complete": args.root is not None, "asked": list(args.rates)}
        chosen = [rows.once({**settings, "seed": seed}, partial(trial, data, pair, seed, args)) for seed in args.seeds]
        for metric in chosen[0]["baseline"]:
            print(f"\n{data}, {pair} pair: " + table(chosen, metric), flush=True)


if __name__ == "__main__":
    main()
