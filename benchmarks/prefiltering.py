"""Does scoring candidates before they are trained on pay? A pool with 20% foreign images, added wholly or in part.

A GAN is trained on 400 digits, 8 × 8: clean ones, or with 20% replaced by garments as in the pool ("contaminated"). A
pool of 600 further digits, of which 20% are replaced by garments, is scored with influence on FID (on clean validation
data) by ITD and by AID, and by `DensitySelector`. What is accepted is added to the training set, and new GANs with
other initial weights, batches and latents are trained on that for as many steps each time; FID on test data then says
what the addition was worth. Each way of choosing is compared with adding all, and with adding a random part of the
pool that is as large. Two rules accept: "transform" keeps what scores no worse than the worst kept training instance
(of a fit that drops 5%), "harmless" what is predicted to improve the metric; "typical and harmless" is what density's
"transform" and ITD's "harmless" both accept. "digits" adds the pool's digits alone, which only an oracle knows.

A finished seed is written to the file of ``--json`` at once and not computed again.

    python -m benchmarks.prefiltering [--start clean contaminated] [--seeds 0 1 2 ...] [--quick] [--json F]
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score

from benchmarks.resumable import Rows
from ganclean import GANInfluence, GANTrainer
from ganclean.backends import AID, ITD
from ganclean.datasets import contaminate, load_digits_images, load_fashion_mnist
from ganclean.metrics import FID, train_classifier
from ganclean.metrics.evaluation import Evaluator
from ganclean.optim import Adam
from ganclean.validation import paired_comparison
from ganclean.valuation import DensitySelector

N_TRAIN, N_POOL, N_HELD_OUT = 400, 600, 398
STARTS = ("contaminated", "clean")


def trainer(n_epochs: int) -> GANTrainer:
    """How every GAN here is trained."""
    return GANTrainer(
        optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), n_epochs=n_epochs, batch_size=50, latent_dim=16, ema_decay=0.99
    )


def accepted(pool: np.ndarray, X: np.ndarray, X_val: np.ndarray, metric: FID, seed: int, args) -> tuple[dict, dict]:
    """Return the rows of the pool that each way accepts, and each way's scores (high: do not take)."""
    rows, scores = {}, {}
    cleanser = GANInfluence(
        trainer=trainer(args.epochs), metric=metric, backend=ITD(last_epochs=args.last_epochs), random_state=seed
    ).fit(X, X_val=X_val)
    solver = AID(solver="gmres", damping=args.damping, max_iter=args.max_iter)
    others = {"itd": cleanser, "aid": GANInfluence(trainer=trainer(args.epochs), metric=metric, backend=solver)}
    others["aid"].set_params(random_state=seed).fit(X, X_val=X_val, trajectory=cleanser.trajectory_)
    for name, fitted in others.items():
        scores[name] = fitted.score_samples(pool)
        rows[f"{name}, transform"] = np.flatnonzero(scores[name] <= fitted.threshold_)
        rows[f"{name}, harmless"] = np.flatnonzero(scores[name] <= 0)
    selector = DensitySelector(retention=0.95, feature_extractor=metric.feature_extractor).fit(X)
    scores["density"] = selector.score_samples(pool)
    rows["density, transform"] = np.flatnonzero(scores["density"] <= selector.threshold_)
    rows["typical and harmless"] = np.intersect1d(rows["density, transform"], rows["itd, harmless"])
    return rows, scores


def trained_value(X: np.ndarray, n_steps: int, metric: FID, seed: int) -> float:
    """Return the metric of a GAN that is trained on X from the start."""
    steps_per_epoch = -(-len(X) // 50)
    fitted = GANInfluence(
        trainer=trainer(max(1, round(n_steps / steps_per_epoch))), metric=metric, backend="random", random_state=seed
    ).fit(X)
    final = fitted.trajectory_.state(len(fitted.trajectory_))
    latents = torch.from_numpy(np.random.RandomState(seed).standard_normal((2000, 16))).float()
    return Evaluator(fitted.trajectory_.step, latents).value(metric, final)


def trial(start: str, seed: int, extractor, args: argparse.Namespace) -> dict:
    """Return one seed's accepted counts, foreign shares, outlier AUCs and metrics on the test data."""
    rng = np.random.RandomState(seed)
    digits = load_digits_images()[0]
    digits = digits[rng.permutation(len(digits))]
    X, pool, X_val, X_test = np.split(digits, np.cumsum([N_TRAIN, N_POOL, N_HELD_OUT]))
    garments, _ = load_fashion_mnist("train", size=8)
    pool, is_foreign = contaminate(pool, garments, 0.2, seed)
    if start == "contaminated":
        X, _ = contaminate(X, garments[::-1], 0.2, seed)
    rows, scores = accepted(pool, X, X_val, FID(extractor, n_samples=2000), seed, args)
    judge = FID(extractor, n_samples=2000).fit(X_test)
    additions = {"none": np.arange(0), "all": np.arange(N_POOL), "digits": np.flatnonzero(~is_foreign), **rows}
    for name, chosen in rows.items():
        additions[f"random, as many as {name}"] = rng.permutation(N_POOL)[: len(chosen)]
    n_steps = args.epochs * -(-N_TRAIN // 50)
    result = {"auc": {name: float(roc_auc_score(is_foreign, s)) for name, s in scores.items()}, "added": {}}
    for name, chosen in additions.items():
        enlarged = np.concatenate([X, pool[chosen]])
        value = np.mean([trained_value(enlarged, n_steps, judge, 1000 * (1 + i) + seed) for i in range(args.trainings)])
        foreign = float(is_foreign[chosen].mean()) if len(chosen) else 0.0
        result["added"][name] = {"n": len(chosen), "foreign": foreign, "fid": float(value)}
    return result


def table(found: list[dict]) -> str:
    """Return a table in Markdown: each way's FID beside those of adding all, and at random."""
    fid = {name: np.array([row["added"][name]["fid"] for row in found]) for name in found[0]["added"]}
    lines = ["| added | instances | foreign | FID (s.d.) | against all | against random |", "| --- |" + " --- |" * 5]
    for name, values in fid.items():
        cells = [np.mean([row["added"][name][key] for row in found]) for key in ("n", "foreign")]
        against = [fid["all"] if name != "all" else None, fid.get(f"random, as many as {name}")]
        compared = ["" if other is None else comparison(other - values) for other in against]
        spread = values.std(ddof=len(values) > 1)
        lines.append(
            f"| {name} | {cells[0]:.0f} | {cells[1]:.1%} | {values.mean():.2f} ({spread:.2f}) | "
            + " | ".join(compared)
            + " |"
        )
    aucs = {name: np.mean([row["auc"][name] for row in found]) for name in found[0]["auc"]}
    lines.append("AUC of foreign against digits: " + ", ".join(f"{name} {auc:.2f}" for name, auc in aucs.items()))
    return "\n".join(lines)


def comparison(improvement: np.ndarray) -> str:
    """Return a mean improvement with its 95% interval and p-value."""
    if len(improvement) < 2:
        return f"{improvement.mean():+.2f}"
    c = paired_comparison(improvement)
    return f"{improvement.mean():+.2f} ({c.low:+.2f} to {c.high:+.2f}), one-sided p = {c.p_value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", nargs="*", choices=STARTS, default=list(STARTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(8)))
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--last-epochs", type=int, default=20)
    parser.add_argument("--trainings", type=int, default=2, help="what FID is averaged over for each addition")
    parser.add_argument("--damping", type=float, default=10.0)
    parser.add_argument("--max-iter", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="2 seeds of 10 epochs")
    parser.add_argument("--json", help="results; seeds that it holds are not computed again")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.epochs, args.last_epochs, args.max_iter = [0, 1], 10, 2, 5
    torch.set_num_threads(1)
    # The secant's residual ends a little above AID's tolerance.
    warnings.simplefilter("ignore", ConvergenceWarning)
    X, y = load_digits_images()
    garments, labels = load_fashion_mnist("train", size=8)
    extractor = train_classifier(np.concatenate([X, garments]), np.concatenate([y, 10 + labels])).features
    rows = Rows(args.json)
    for start in args.start:
        settings = {name: vars(args)[name] for name in ("epochs", "last_epochs", "trainings", "damping", "max_iter")}
        settings["start"] = start
        found = [
            rows.once({**settings, "seed": seed}, partial(trial, start, seed, extractor, args)) for seed in args.seeds
        ]
        print(f"\n{start} training set, {len(found)} seeds\n{table(found)}", flush=True)


if __name__ == "__main__":
    main()
