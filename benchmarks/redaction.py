"""Does redaction redact, and what does it cost? A label or an attribute is taken out of a trained GAN.

Digits, 8 × 8, a pair of perceptrons with batch normalisation (G) and dropout (D), 200 epochs; and Fashion-MNIST,
28 × 28, the default convolutional pair on 2,000 images. Each criterion is redacted by every method and by deletion
fine-tuning with the same number of steps. Invalidity is that of 4,000 samples by a judge that was trained on other data
than the criterion; Fréchet distance (32 principal components) and recall are to held-out data without the redacted
part. Seconds are those of the processor.

    python -m benchmarks.redaction [--data digits fashion] [--labels 0 3 8] [--seeds 0 1] [--experiments table lam ...]
                                   [--methods data validity ...] [--quick] [--json F]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.environment import write_results
from ganclean import GANInfluence, GANTrainer, train_gan
from ganclean.backends import ITD
from ganclean.datasets import contaminate, load_digits_images, load_fashion_mnist
from ganclean.metrics import FID, train_classifier
from ganclean.networks import ConvDiscriminator, ConvGenerator
from ganclean.optim import Adam
from ganclean.redaction import (
    AnyOf,
    ClassifierCriterion,
    CrossEntropyRefit,
    DeletionFineTuner,
    GANRedactor,
    RejectionSampler,
    RetrainingRedactor,
    SampleCriterion,
)

EXPERIMENTS = ("table", "lam", "unfiltered", "relapse", "cumulative", "poor", "influence")
METHODS = ("deletion", "data", "validity", "guide", "penalty", "combined", "refit", "rejection", "retraining")


@dataclass(frozen=True)
class Task:
    """One GAN's data, networks and training, and the redaction of it."""

    make_networks: Callable[[], tuple[nn.Module, nn.Module]]
    trainer: GANTrainer
    redaction: GANTrainer
    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


@dataclass(frozen=True)
class Region:
    """What is redacted: a rule for the criterion, another one that measures, and a classifier of the first."""

    name: str
    is_valid: Callable[[Any], Any]
    judge: Callable[[Any], Any]
    classifier: ClassifierCriterion


def digits_task(seed: int, quick: bool) -> Task:
    X, y = load_digits_images()
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.3, random_state=seed, stratify=y)

    def make_networks():
        generator = nn.Sequential(
            *(nn.Linear(32, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()),
            *(nn.Linear(256, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()),
            *(nn.Linear(256, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))),
        )
        discriminator = nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, 256), nn.LeakyReLU(0.2), nn.Dropout(0.3)),
            *(nn.Linear(256, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 1)),
        )
        return generator, discriminator

    trainer = GANTrainer(
        optimizer=Adam(lr=2e-4, betas=(0.5, 0.999)), n_epochs=20 if quick else 200, batch_size=64, latent_dim=32
    )
    return Task(make_networks, trainer, shortened(trainer, 3 if quick else 20), X, y, X_test, y_test)


def fashion_task(seed: int, quick: bool) -> Task:
    X, y = load_fashion_mnist()
    X_test, y_test = load_fashion_mnist("test")

    def make_networks():
        return ConvGenerator((1, 28, 28), 32, width=16), ConvDiscriminator((1, 28, 28), width=16)

    trainer = GANTrainer(
        optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), n_epochs=2 if quick else 80, batch_size=64, latent_dim=32
    )
    return Task(make_networks, trainer, shortened(trainer, 1 if quick else 8), X, y, X_test, y_test)


TASKS = {"digits": digits_task, "fashion": fashion_task}


def shortened(trainer: GANTrainer, n_epochs: int) -> GANTrainer:
    return clone(trainer).set_params(n_epochs=n_epochs)


def trained(task: Task, seed: int) -> tuple[nn.Module, nn.Module, float]:
    """Pre-train; return the networks and the seconds that it took."""
    begin = time.process_time()
    torch.manual_seed(seed)
    generator, discriminator = task.make_networks()
    networks = train_gan(
        task.X, generator=generator, discriminator=discriminator, trainer=task.trainer, random_state=seed
    )
    return *networks, time.process_time() - begin


def perceptron_of(X: np.ndarray, y: np.ndarray, seed: int) -> nn.Module:
    """Train the classifier that the digits' criterion is made of, on noisy images."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, labels = torch.from_numpy(X), torch.from_numpy(y)
    for _ in range(40):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(images[rows] + 0.1 * torch.randn_like(images[rows])), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def support_vectors_of(X: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    machine = SVC(C=10).fit(X.reshape(len(X), -1), y)
    return lambda x: machine.predict(x.reshape(len(x), -1))


def regions(name: str, task: Task, labels: list[int], seed: int) -> list[Region]:
    """Return the labels to redact, and of garments those that are brighter than most."""
    if name == "digits":
        model, judge = perceptron_of(task.X, task.y, seed), support_vectors_of(task.X_test, task.y_test)
    else:
        model, other = train_classifier(task.X, task.y), train_classifier(task.X_test, task.y_test)

        def judge(x):
            return other(torch.as_tensor(x)).argmax(1).numpy()

    def of_label(label: int) -> Region:
        criterion = ClassifierCriterion(model, invalid_class=label)
        return Region(f"label {label}", criterion.is_valid, lambda x: judge(x) != label, criterion)

    found = [of_label(label) for label in labels]
    if name == "fashion":
        limit = float(np.quantile(task.X.mean((1, 2, 3)), 0.85))

        def is_dark(x):
            return x.mean((1, 2, 3)) < limit

        # A soft form of the rule itself, at one half on the limit.
        soft = ClassifierCriterion(lambda x: torch.sigmoid((limit - x.mean((1, 2, 3))) / 0.05))
        found.append(Region("bright", is_dark, is_dark, soft))
    return found


def redactor_of(method: str, networks: tuple, task: Task, region: Region, seed: int, **settings):
    """Return a redactor or baseline; one of METHODS."""
    shared: dict[str, Any] = {"trainer": task.redaction, "random_state": seed}
    valid = np.asarray(region.is_valid(task.X))
    known = SampleCriterion(task.X[~valid], match=region.is_valid)
    baselines = {"deletion": DeletionFineTuner, "rejection": RejectionSampler}
    if method in baselines:
        return baselines[method](*networks, known, **shared)
    if method == "retraining":
        return RetrainingRedactor(
            *networks, known, make_networks=task.make_networks, trainer=task.trainer, random_state=seed
        )
    if method in ("guide", "penalty"):
        return GANRedactor(*networks, region.classifier, method="classifier", guide=method, **shared | settings)
    if method == "refit":
        refit = CrossEntropyRefit(region.classifier.invalid_class)
        return GANRedactor(*networks, clone(region.classifier).set_params(refit=refit), **shared | settings)
    criterion = {"data": known, "validity": region.is_valid, "combined": region.classifier}[method]
    return GANRedactor(*networks, criterion, **shared | settings)


def measured(redactor, task: Task, region: Region, features) -> dict:
    """Fit, and return what came out by the independent judge."""
    begin = time.process_time()
    redactor.fit(task.X)
    seconds = time.process_time() - begin
    keep = np.asarray(region.judge(task.X_test))
    report = redactor.report(task.X_test[keep], evaluator=region.judge, feature_extractor=features)
    before, after, _ = report.evaluated
    return {
        "invalidity_before": before.rate,
        "invalidity": after.rate,
        "interval": [after.low, after.high],
        "invalidity_by_criterion": report.invalidity[1].rate,
        **report.quality[1],
        "frechet_before": report.quality[0]["frechet_distance"],
        "recall_before": report.quality[0]["recall"],
        "seconds": seconds,
        "steps": report.n_steps,
        "queries": report.n_queries,
    }


def principal_components(X: np.ndarray) -> Callable[[torch.Tensor], torch.Tensor]:
    pca = PCA(32, random_state=0).fit(X.reshape(len(X), -1))
    mean, axes = torch.from_numpy(pca.mean_), torch.from_numpy(pca.components_.T)
    return lambda x: (x.flatten(1).double() - mean) @ axes.double()


def influence_experiment(seed: int, quick: bool) -> list[dict]:
    """Redact what influence found harmful in digits of which a tenth are garments."""
    X, y = load_digits_images()
    garments, of_garments = load_fashion_mnist(size=8)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.3, random_state=seed, stratify=y)
    X, is_foreign = contaminate(X, garments[:1000], 0.1, random_state=seed)
    classifier = train_classifier(np.r_[X_test, garments], np.r_[y_test, 10 + of_garments])
    judge = support_vectors_of(np.r_[X_test, garments[1000:]], np.r_[np.zeros(len(X_test)), np.ones(1000)])
    trainer = GANTrainer(
        optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)),
        n_epochs=5 if quick else 25,
        batch_size=50,
        latent_dim=16,
        ema_decay=0.99,
    )
    backend = ITD(last_epochs=1 if quick else 5)
    metric = FID(classifier.features, n_samples=2000)
    cleanser = GANInfluence(trainer=trainer, metric=metric, backend=backend, n_remove=0.1, random_state=seed)
    cleanser.fit(X, X_val=X_test[::2])
    networks, reference = (cleanser.generator_, cleanser.discriminator_), X_test[1::2]
    shared = {"trainer": shortened(trainer, 1 if quick else 5), "random_state": seed}
    chosen = np.random.RandomState(seed).permutation(len(X))[: len(X) // 10]
    criteria = {
        "influence": SampleCriterion.from_cleanser(cleanser),
        "random": SampleCriterion(X[chosen]),
        "all garments": SampleCriterion(X[is_foreign]),
    }
    redactors: dict[str, Any] = {
        # Nothing equals a constant image, so that this is training on all data.
        "no removal, more training": DeletionFineTuner(*networks, SampleCriterion(np.full_like(X[:1], 9)), **shared)
    }
    for name, criterion in criteria.items():
        redactors[f"deletion: {name}"] = DeletionFineTuner(*networks, criterion, **shared)
        redactors[f"redaction: {name}"] = GANRedactor(*networks, criterion, **shared)
    rows = []
    for name, redactor in redactors.items():
        report = redactor.fit(X).report(
            reference, evaluator=lambda x: judge(x) == 0, feature_extractor=classifier.features
        )
        rows.append(
            {
                "experiment": "influence",
                "data": "digits",
                "seed": seed,
                "region": "garments",
                "method": name,
                "garments_found": float(is_foreign[~cleanser.support_].mean()),
                "invalidity_before": report.evaluated[0].rate,
                "invalidity": report.evaluated[1].rate,
                "frechet_before": report.quality[0]["frechet_distance"],
                "recall_before": report.quality[0]["recall"],
                **report.quality[1],
            }
        )
        show(rows[-1])
    return rows


def run_task(name: str, args: argparse.Namespace, seed: int) -> list[dict]:
    """Pre-train one GAN and make all experiments that are asked for on it."""
    task = TASKS[name](seed, args.quick)
    generator, discriminator, seconds = trained(task, seed)
    networks = generator, discriminator
    features = principal_components(task.X)
    rows: list[dict] = []

    def add(experiment: str, region: Region, method: str, redactor, **beside) -> dict:
        row = {"experiment": experiment, "data": name, "seed": seed, "region": region.name, "method": method}
        row |= beside | measured(redactor, task, region, features)
        row["share_of_pretraining"] = row["seconds"] / seconds
        rows.append(row)
        show(row)
        return row

    found = regions(name, task, args.labels if name == "digits" else args.labels[:1], seed)
    for region in found if "table" in args.experiments else []:
        for method in args.methods:
            skipped = method == "retraining" and not (region is found[0] and seed == args.seeds[0])
            # The soft form of a rule has nothing to train.
            skipped |= method == "refit" and not isinstance(region.classifier.model, nn.Module)
            if not skipped:
                add("table", region, method, redactor_of(method, networks, task, region, seed))
    if name != "digits":
        return rows
    for region in found if "poor" in args.experiments else []:
        invalid = region.classifier.invalid_class
        poor = perceptron_of(task.X[:50], task.y[:50], seed)
        for method, refit in (("as it is", None), ("refit", CrossEntropyRefit(invalid))):
            # With a low threshold the good rule judges, and the poor classifier only leads.
            criterion = AnyOf([region.is_valid, ClassifierCriterion(poor, 0.01, invalid, refit)])
            add("poor", region, method, GANRedactor(*networks, criterion, trainer=task.redaction, random_state=seed))
    three = shortened(task.trainer, 3)
    for region in found if "lam" in args.experiments else []:
        for lam in (1.0, 0.8, 0.5):
            redactor = redactor_of("data", networks, task, region, seed, lam=lam, trainer=three)
            add("lam", region, f"lam={lam}", redactor)
    region = found[min(1, len(found) - 1)]
    if "unfiltered" in args.experiments:
        for lam in (0.95, 0.9, 0.8, 0.5):
            redactor = redactor_of("data", networks, task, region, seed, lam=lam, filter_retain=False)
            add("unfiltered", region, f"lam={lam}", redactor)
    if "relapse" in args.experiments:
        redacted = redactor_of("data", networks, task, region, seed).fit(task.X)
        onwards = DeletionFineTuner(
            redacted.generator_, redacted.discriminator_, trainer=task.redaction, random_state=seed
        ).set_params(criterion=lambda x: np.ones(len(x), dtype=bool))
        add("relapse", region, "20 epochs on all data", onwards)
    if "cumulative" in args.experiments and len(found) > 1:
        first, last = found[-2:]
        once = redactor_of("data", networks, task, first, seed).fit(task.X)
        pair = once.generator_, once.discriminator_
        both = AnyOf([first.classifier, last.classifier])
        joint = GANRedactor(*pair, both, method="validity", trainer=task.redaction, random_state=seed)
        forgetful = redactor_of("data", pair, task, last, seed)
        for method, redactor in (("only the second", forgetful), ("AnyOf both", joint)):
            add("cumulative", first, method, redactor)
            add("cumulative", last, method, clone(redactor))
    return rows


def show(row: dict) -> None:
    print(
        f"{row['experiment']:<11}{row['data']:<8} seed {row['seed']}  {row['region']:<9}{row['method']:<26}"
        f"invalid {row['invalidity_before']:7.2%} → {row['invalidity']:6.2%}  Fréchet {row['frechet_before']:6.3f} → "
        f"{row['frechet_distance']:6.3f}  recall {row['recall_before']:.3f} → {row['recall']:.3f}  "
        f"{row.get('share_of_pretraining', math.nan):.2f} of the pre-training",
        flush=True,
    )


def summarise(rows: list[dict]) -> None:
    """Print means over seeds and labels."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        region = "labels" if row["region"].startswith("label") else row["region"]
        groups.setdefault((row["experiment"], row["data"], region, row["method"]), []).append(row)
    print("\nexperiment, data, region, method | invalid before | after [worst] | Fréchet | recall | n")
    for key, group in groups.items():
        before, after, frechet, recall = (
            np.array([row[name] for row in group])
            for name in ("invalidity_before", "invalidity", "frechet_distance", "recall")
        )
        print(
            f"{', '.join(key)} | {before.mean():.2%} | {after.mean():.2%} [{after.max():.2%}] | {frechet.mean():.3f} | "
            f"{recall.mean():.3f} | {len(group)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--labels", type=int, nargs="+", default=[0, 3, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--experiments", nargs="+", default=list(EXPERIMENTS), choices=EXPERIMENTS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--quick", action="store_true", help="a fraction of everything, to see that it runs")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.quick:
        args.labels, args.seeds = args.labels[:2], args.seeds[:1]
    warnings.simplefilter("ignore", UserWarning)
    rows: list[dict] = []
    for seed in args.seeds:
        for name in args.data:
            rows += run_task(name, args, seed)
        if "influence" in args.experiments:
            rows += influence_experiment(seed, args.quick)
    summarise(rows)
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    write_results(args.json, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
