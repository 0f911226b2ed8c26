"""Credit, typicality or influence: which score finds the instances that a GAN is better off without?

The scores answer different questions (see docs/valuation.md): GMValuator's credit says which instances the generated
samples resemble, a density which instances are typical, influence what a metric of the generator would do. Here all of
them choose what to remove, and real training judges, on held-out data:

- "outliers": the ROC-AUC of finding foreign instances, of four kinds. Hardly learned: 10% of the training images are
  replaced by those of the other data set. Learned: the same data, trained on three times as long. Not learned: 3% are
  replaced by images whose pixels are shuffled. Never seen: a generator of clean data, and candidates that it was not
  trained on, 20% of the other data set. The share of foreign samples among the generated is measured, too.
- "removal": the most harmful removed from the data with 10% foreign images, and the last epochs replayed with the same
  batches and latents, or a GAN trained anew; the change of held-out FID, paired over seeds.
- "LDS": the linear datamodelling score, the rank correlation over random halves of the data between the summed scores
  of what is left out and the improvement that leaving it out brings; replayed and trained anew.

Data: 1,079 digits of 8 × 8, with garments as the foreign images, and 1,400 garments of 14 × 14 with digits. The default
convolutional pair, alternating Adam, moving average; FID in 32 features of a small classifier that knows both data sets
and shuffled images. Each seed has its own split, outliers, initial weights, batches and latents. A finished part of a
seed is written to the file of ``--json`` at once and not computed again.

    python -m benchmarks.head_to_head [--data digits fashion] [--parts outliers learned replayed anew lds lds_anew]
        [--seeds 0 1 2 ...] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from scipy.stats import spearmanr, t
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score

from benchmarks.reproduction_cleansing import table
from benchmarks.resumable import Rows
from ganclean import GANInfluence, GANTrainer
from ganclean.backends import AID, ITD
from ganclean.data import DataSource
from ganclean.datasets import contaminate, load_digits_images, load_fashion_mnist
from ganclean.metrics import FID, KID, train_classifier
from ganclean.metrics.extractors import features_of
from ganclean.optim import Adam
from ganclean.validation import cleansing_curve, counterfactual_retrain
from ganclean.valuation import DensitySelector, GMValuator

SIDE = {"digits": 8, "fashion": 14}
PARTS = ("outliers", "learned", "replayed", "anew", "lds", "lds_anew")


@cache
def images(data: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a data set's images, and those that are foreign to it."""
    side = SIDE[data]
    digits = torch.from_numpy(load_digits_images()[0])
    digits = torch.nn.functional.interpolate(digits, size=(side, side), mode="bilinear").numpy()
    garments = load_fashion_mnist("train", size=side)[0]
    return (digits, garments) if data == "digits" else (garments, digits)


def shuffled(X: np.ndarray, seed: int) -> np.ndarray:
    """Return images with their pixels in random order."""
    flat = X.reshape(len(X), -1)
    return np.random.default_rng(seed).permuted(flat, axis=1).reshape(X.shape)


@cache
def classifier(data: str):
    """Return a classifier of a data set's own classes, of the foreign images (class 10) and of shuffled ones (11)."""
    own, foreign = images(data)
    labels = load_digits_images()[1] if data == "digits" else load_fashion_mnist("train", size=14)[1]
    X = np.concatenate([own, foreign, shuffled(own, 0)])
    return train_classifier(X, np.concatenate([labels, np.full(len(foreign), 10), np.full(len(own), 11)]))


def trainer(args: argparse.Namespace) -> GANTrainer:
    """How every GAN here is trained."""
    rule = Adam(lr=1e-3, betas=(0.5, 0.99))
    return GANTrainer(optimizer=rule, n_epochs=args.epochs, batch_size=50, latent_dim=16, ema_decay=0.99)


def fitted(data: str, X: np.ndarray, X_val: np.ndarray, seed: int, args: argparse.Namespace) -> GANInfluence:
    """Train a GAN and trace influence on FID and KID."""
    metrics = {kind.__name__: kind(classifier(data).features, n_samples=1000) for kind in (FID, KID)}
    backend = ITD(last_epochs=args.last_epochs)
    return GANInfluence(trainer=trainer(args), metric=metrics, backend=backend, random_state=seed).fit(X, X_val=X_val)


class Credit:
    """GMValuator with some settings, as a selector."""

    def __init__(self, **settings):
        self.settings = settings

    def __call__(self, cleanser: GANInfluence, seed: int, X: np.ndarray | None = None) -> np.ndarray:
        valuator = GMValuator(feature_extractor=cleanser.metric_.extractor_, random_state=seed, **self.settings)
        samples = {"X_ref": cleanser.reference_}
        if self.settings.get("query") != "reference":
            samples["X_gen"] = cleanser.sample(2000)[0]
        return valuator.fit(training_data(cleanser) if X is None else X, **samples).harmfulness_


def training_data(cleanser: GANInfluence) -> np.ndarray:
    """Return what a cleanser was fitted to."""
    return cleanser.trajectory_.source.data


def density(cleanser: GANInfluence, seed: int, X: np.ndarray | None = None) -> np.ndarray:
    """Return how improbable instances are under a Gaussian of the training data's features."""
    selector = DensitySelector(feature_extractor=cleanser.metric_.extractor_).fit(training_data(cleanser))
    return selector.harmfulness_ if X is None else selector.score_samples(X)


def isolation_forest(cleanser: GANInfluence, seed: int, X: np.ndarray | None = None) -> np.ndarray:
    """Return how isolated instances are in the features."""
    known, asked = (
        features_of(DataSource(data), cleanser.metric_.extractor_)
        for data in (training_data(cleanser), training_data(cleanser) if X is None else X)
    )
    return -IsolationForest(random_state=seed).fit(known).score_samples(asked)


def log_density_ratio(cleanser: GANInfluence, seed: int, X: np.ndarray | None = None) -> np.ndarray:
    """Return minus the discriminator's logit, the mean over the ends of the last five epochs."""
    trajectory = cleanser.trajectory_
    samples = DataSource(training_data(cleanser) if X is None else X).cast(torch.float32, None)
    ends = [len(trajectory) - i * trajectory.steps_per_epoch for i in range(5)]
    with torch.no_grad():
        logits = [
            trajectory.step.judge(state.discriminator, state.buffers_discriminator, samples[range(len(samples))])
            for state in (trajectory.state(end) for end in ends)
        ]
    return -torch.stack(logits).mean(dim=0).double().numpy()


class Influence:
    """Influence on one of the cleanser's metrics, traced through the run."""

    def __init__(self, metric: str):
        self.metric = metric

    def __call__(self, cleanser: GANInfluence, seed: int, X: np.ndarray | None = None) -> np.ndarray:
        if X is None:
            return -cleanser.influences_[self.metric]
        return -cleanser.backend_.score_samples(cleanser.trajectory_, cleanser.gradients_[self.metric], source_of(X))


def source_of(X: np.ndarray) -> DataSource:
    """Return candidates as a back-end takes them."""
    return DataSource(X).cast(torch.float32, None)


def aid(cleanser: GANInfluence, seed: int, X: np.ndarray | None = None) -> np.ndarray:
    """Return influence on FID from the final model alone, by damped GMRES."""
    gradient = {"FID": cleanser.gradients_["FID"]}
    backend = AID(damping=10.0, max_iter=30).fit(cleanser.trajectory_, gradient)
    if X is None:
        return -backend.influences_["FID"]
    return -backend.score_samples(cleanser.trajectory_, gradient["FID"], source_of(X))


def random(cleanser: GANInfluence, seed: int, X: np.ndarray | None = None) -> np.ndarray:
    """Return a random order."""
    return np.random.RandomState(seed).uniform(size=len(training_data(cleanser) if X is None else X))


METHODS = {
    "ITD, FID": Influence("FID"),
    "ITD, KID": Influence("KID"),
    "AID, FID": aid,
    "GMValuator": Credit(),
    "GMValuator, realism": Credit(quality="realism"),
    "GMValuator, reference": Credit(query="reference"),
    "DensitySelector": density,
    "Isolation Forest": isolation_forest,
    "log density ratio": log_density_ratio,
    "random": random,
}


def parts_of(data: str, seed: int, args: argparse.Namespace) -> tuple[np.ndarray, ...]:
    """Return training, validation and test images."""
    X = images(data)[0]
    X = X[np.random.default_rng(seed).permutation(len(X))]
    sizes = (200, 100) if args.quick else (1079, 359) if data == "digits" else (1400, 300)
    return tuple(np.split(X, np.cumsum([*sizes, sizes[1]]))[:3])


def contaminated(data: str, seed: int, args: argparse.Namespace):
    """Return a cleanser of data with 10% foreign images, which of them these are, and the test data."""
    X, X_val, X_test = parts_of(data, seed, args)
    X, is_foreign = contaminate(X, images(data)[1], 0.1, seed)
    return fitted(data, X, X_val, seed, args), is_foreign, X_test


def outliers(data: str, seed: int, args: argparse.Namespace) -> dict:
    """Return the AUC of every method for each kind of outlier, and how much of each kind is generated."""
    X, X_val, X_test = parts_of(data, seed, args)
    with_noise, is_noise = contaminate(X, shuffled(X, seed), 0.03, seed)
    candidates, is_new = contaminate(X_test, images(data)[1][::-1], 0.2, seed)
    not_learned, clean = fitted(data, with_noise, X_val, seed, args), fitted(data, X, X_val, seed, args)
    hardly, is_foreign, _ = contaminated(data, seed, args)
    return {
        "hardly learned": scored(data, hardly, is_foreign, 10, seed),
        "not learned": scored(data, not_learned, is_noise, 11, seed),
        "never seen": scored(data, clean, is_new, 10, seed, candidates),
    }


def learned(data: str, seed: int, args: argparse.Namespace) -> dict:
    """Return the same for outliers that the generator imitates."""
    longer = argparse.Namespace(**{**vars(args), "epochs": 3 * args.epochs})
    cleanser, is_foreign, _ = contaminated(data, seed, longer)
    return {"learned": scored(data, cleanser, is_foreign, 10, seed)}


def scored(
    data: str, cleanser: GANInfluence, is_outlier: np.ndarray, label: int, seed: int, X=None
) -> dict[str, float]:
    """Return the AUC of every method, and which part of the samples the classifier takes for such outliers."""
    auc = {name: float(roc_auc_score(is_outlier, method(cleanser, seed, X))) for name, method in METHODS.items()}
    found = classifier(data)(torch.from_numpy(cleanser.sample(2000)[0])).argmax(dim=1) == label
    return auc | {"generated share": float(found.double().mean())}


def removal(data: str, seed: int, args: argparse.Namespace, last_epochs: int | None, rates: list[float]) -> dict:
    """Return held-out FID without removal and after every method's removals."""
    cleanser, _, X_test = contaminated(data, seed, args)
    curve = cleansing_curve(cleanser, X_test, rates, selectors=METHODS, n_seeds=1, last_epochs=last_epochs)
    return {
        "rates": curve.rates.tolist(),
        "baseline": {"FID": float(curve.baseline["FID"][0])},
        "values": {"FID": {name: found[0].tolist() for name, found in curve.values["FID"].items()}},
        "greater_is_better": {"FID": False},
    }


def datamodelling(data: str, seed: int, args: argparse.Namespace, anew: bool) -> dict:
    """Return each method's rank correlation with what leaving out random halves brings."""
    cleanser, _, X_test = contaminated(data, seed, args)
    rng, n = np.random.RandomState(seed), len(training_data(cleanser))
    removals = [rng.permutation(n)[: n // 2] for _ in range(args.subsets)]
    metric = FID(cleanser.metric_.extractor_, n_samples=1000).fit(X_test)
    how = {"seeds": [10_000 + seed, 20_000 + seed]} if anew else {"last_epochs": args.last_epochs, "renormalize": True}
    values = counterfactual_retrain(cleanser, removals, metric=metric, **how)
    true = -np.atleast_2d(values).mean(axis=0)
    scores = {name: method(cleanser, seed) for name, method in METHODS.items()}
    return {
        name: float(spearmanr([score[rows].sum() for rows in removals], true).statistic)
        for name, score in scores.items()
    }


def computed(part: str, data: str, seed: int, args: argparse.Namespace) -> dict:
    """Return one part of one seed."""
    if part == "outliers":
        result = outliers(data, seed, args)
    elif part == "learned":
        result = learned(data, seed, args)
    elif part == "replayed":
        result = removal(data, seed, args, args.last_epochs, [0.02, 0.05, 0.1, 0.2, 0.3])
    elif part == "anew":
        result = removal(data, seed, args, None, [0.1, 0.2])
    else:
        result = datamodelling(data, seed, args, anew=part == "lds_anew")
    return {"result": result}


def interval(values: list[float]) -> str:
    """Return a mean of numbers in [−1, 1] with its 95% interval over seeds."""
    mean, n = np.mean(values), len(values)
    if n < 2:
        return f"{mean:.2f}"
    half = t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5
    return f"{mean:.2f} ({max(mean - half, -1):.2f} to {min(mean + half, 1):.2f})"


def spread(values: list[float]) -> str:
    """Return a mean with the standard deviation over seeds."""
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=len(values) > 1):.2f}"


def columns(
    found: list[dict[str, dict[str, float]]],
    text: Callable[[list[float]], str],
    names: tuple[str, ...] = tuple(METHODS),
) -> str:
    """Return a table in Markdown: a row for each method, a column for each kind, and what the seeds give as text."""
    kinds = list(found[0])
    lines = ["| | " + " | ".join(kinds) + " |", "| --- |" + " --- |" * len(kinds)]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(text([row[kind][name] for row in found]) for kind in kinds) + " |")
    return "\n".join(lines)


def show(data: str, found: dict[str, list[dict]]) -> None:
    """Print the tables of one data set."""
    print(f"\n## {data}")
    for part, rows in found.items():
        print(f"\n{part}, {len(rows)} seeds")
        results = [row["result"] for row in rows]
        if part in ("outliers", "learned"):
            print(columns(results, spread, (*METHODS, "generated share")))
        elif part.startswith("lds"):
            print(columns([{"LDS": result} for result in results], interval))
        else:
            print(table(results, "FID"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", choices=list(SIDE), default=list(SIDE))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(8)))
    parser.add_argument("--lds-seeds", type=int, nargs="*", default=[0, 1, 2], help="seeds of lds_anew")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--last-epochs", type=int, default=5)
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="2 seeds, a fraction of the data, 5 epochs")
    parser.add_argument("--json", help="results; parts that it holds are not computed again")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.lds_seeds, args.epochs, args.last_epochs, args.subsets = [0, 1], [0, 1], 5, 2, 6
    torch.set_num_threads(1)
    # The secant's residual ends a little above AID's tolerance.
    warnings.simplefilter("ignore", ConvergenceWarning)
    rows = Rows(args.json)
    for data in args.data:
        found: dict[str, list[dict]] = {part: [] for part in args.parts}
        for part, seed in ((part, seed) for seed in args.seeds for part in args.parts):
            if part == "lds_anew" and seed not in args.lds_seeds:
                continue
            key = {"data": data, "part": part, "seed": seed, "epochs": args.epochs, "last_epochs": args.last_epochs}
            if part.startswith("lds"):
                key["subsets"] = args.subsets
            found[part].append(rows.once(key, partial(computed, part, data, seed, args)))
        show(data, {part: rows for part, rows in found.items() if rows})


if __name__ == "__main__":
    main()
