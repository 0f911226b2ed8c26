"""The command ``ganclean``."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ganclean._version import __version__
from ganclean.backends import ITD, resolve_backend
from ganclean.cleansing import GANInfluence
from ganclean.cleansing.removal import RATES
from ganclean.datasets import contaminate, load_fashion_mnist
from ganclean.exceptions import GANCleanError, missing_extra
from ganclean.files import LoadedData, read_data
from ganclean.metrics import FID, KID, MMD, PRDC, AverageLogLikelihood, InceptionScore, train_classifier
from ganclean.metrics.base import Metric
from ganclean.metrics.prdc import QUANTITIES
from ganclean.optim import Adam
from ganclean.plotting.style import selector_label
from ganclean.reporting import CleansingCase, window, write_report
from ganclean.reporting.table import table_of
from ganclean.training.trainer import GANTrainer
from ganclean.validation import cleansing_curve, trust_report
from ganclean.validation.selectors import SELECTORS

Extractor = tuple[Any, Any, str]

LABELS = {
    "fid": "FID",
    "kid": "KID",
    "mmd": "MMD",
    "inception_score": "inception score",
    "log_likelihood": "log-likelihood",
}
EVALUATED = ["fid", "kid", *QUANTITIES]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (GANCleanError, ValueError) as error:
        print(f"ganclean: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ganclean", description="Find the training instances that harm a GAN, and prove that removing them helps."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    cleanse = commands.add_parser(
        "cleanse",
        help="find and remove harmful training instances",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cleanse.set_defaults(run=_cleanse)
    cleanse.add_argument("data", help="'digits', a folder of images, an .npy array or an .npz archive with X (and y)")
    cleanse.add_argument("--metric", choices=list(LABELS), default="fid")
    cleanse.add_argument("--backend", default="itd", help="name of an influence back-end")
    cleanse.add_argument(
        "--remove",
        type=_amount_or_auto,
        default=0.1,
        help="how much to remove: 5%%, 0.05, a count, or auto, which is what helps most on validation data",
    )
    cleanse.add_argument("--report", default="report", help="folder for the report")
    networks = cleanse.add_argument_group("networks")
    networks.add_argument("--generator", metavar="MODULE:FUNCTION", help="from the shape of an instance to a module")
    networks.add_argument("--discriminator", metavar="MODULE:FUNCTION")
    networks.add_argument(
        "--features",
        default="auto",
        metavar="NAME",
        help="feature extractor of the metric: classifier (trained on the labels), inception, pixels or MODULE:OBJECT; "
        "auto takes a classifier where there are labels",
    )
    training = cleanse.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=25)
    training.add_argument("--batch-size", type=int, default=50)
    training.add_argument("--latent-dim", type=int, default=16)
    training.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    training.add_argument("--ema", type=float, default=0.99, help="decay of the generator's moving average")
    training.add_argument("--image-size", type=int, help="resize a folder's images")
    proof = cleanse.add_argument_group("influence and proof")
    proof.add_argument("--last-epochs", type=int, default=5, help="how many epochs to trace back")
    proof.add_argument("--runs", type=int, default=1, help="average the influence over so many trainings")
    proof.add_argument(
        "--retrain-epochs", default="traced", metavar="N", help="how many epochs to retrain: traced, all or a number"
    )
    proof.add_argument("--samples", type=int, default=2000, help="generated samples that the metric is computed from")
    proof.add_argument("--held-out", type=float, default=0.2, help="fraction for validation, and again for the test")
    proof.add_argument(
        "--rates",
        type=_amount,
        nargs="+",
        help="removal rates to try; default 5%% 10%% 20%%, and with --remove auto the rates that it chooses from",
    )
    proof.add_argument(
        "--selectors",
        nargs="+",
        choices=list(SELECTORS),
        default=["isolation_forest", "density", "random"],
        metavar="NAME",
        help=f"baselines that influence must beat: {', '.join(list(SELECTORS)[1:])}; discriminator_loss traces every "
        "training once more",
    )
    proof.add_argument(
        "--evaluate",
        nargs="*",
        choices=EVALUATED,
        default=EVALUATED,
        metavar="NAME",
        help=f"what removal is judged by beside the metric, on the same features: {', '.join(EVALUATED)}; none of them "
        "where nothing is named",
    )
    proof.add_argument("--probes", type=int, default=10, help="retrainings that tell whether influence can be trusted")
    proof.add_argument("--seeds", type=int, default=5, help="trainings to compare over")
    proof.add_argument("--jobs", type=int, default=None, help="trainings side by side; default the number of cores")
    proof.add_argument("--seed", type=int, default=0)
    return parser


def _amount(text: str) -> float | int:
    """Return a fraction from '5%' or '0.05', or a count from '50'."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a percentage, a fraction or a count; got {text!r}") from None


def _amount_or_auto(text: str) -> float | int | str:
    try:
        return text if text == "auto" else _amount(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a percentage, a fraction, a count or auto; got {text!r}") from None


def _cleanse(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    if args.probes == 1 or args.probes < 0:
        raise ValueError(f"--probes must be 0 or at least 2; got {args.probes}.")
    console = _console()
    data = read_data(args.data, args.image_size)
    console.print(f"[bold]{data.name}[/]: {len(data.X)} instances of shape {data.X.shape[1:]}")
    extractor = _extractor(args, data)
    console.print(f"metric: {args.metric} on {extractor[2]}")
    train, validation, test = _split(len(data.X), args.held_out, args.seed)
    X = data.X[train]
    inputs: list[tuple[str, np.ndarray, np.ndarray | None]] = [(data.name, X, None)]
    if args.data == "digits":
        foreign, _ = load_fashion_mnist("train", size=8)
        inputs.append(("digits, 10% replaced by garments", *contaminate(X, foreign, 0.1, args.seed)))
    cases = []
    for title, X, is_foreign in inputs:
        console.rule(title)
        cleaner = _cleaner(args, extractor)
        console.print(str(cleaner.estimate_cost(X)))
        cleaner.fit(X, X_val=data.X[validation])
        if args.jobs is None:
            args.jobs = 1 if torch.cuda.is_available() else min(args.seeds, os.cpu_count() or 1)
        curve = cleansing_curve(
            cleaner,
            data.X[test],
            [_fraction(r, len(X)) for r in args.rates or (RATES[1:] if args.remove == "auto" else (0.05, 0.1, 0.2))],
            selectors=["influence", *(name for name in args.selectors if name != "influence")],
            metrics=_evaluated(args, extractor),
            n_seeds=args.seeds,
            last_epochs=_retrained_epochs(args),
            n_jobs=args.jobs,
        )
        trust = trust_report(cleaner, n_probes=args.probes, n_jobs=args.jobs) if args.probes else None
        files = None if data.files is None else [data.files[i] for i in train]
        case = CleansingCase(title, X, train, cleaner, curve, trust, is_foreign, files)
        _summarise(console, case)
        cases.append(case)
    seconds = time.perf_counter() - begin
    page = write_report(args.report, cases, _settings(args, data, extractor, cases[0], seconds))
    console.print(f"report: [bold]{page}[/]  ({seconds:.0f} s)")
    return 0


def _console():
    try:
        from rich.console import Console
    except ImportError as error:
        raise missing_extra("rich", "cli") from error
    return Console(highlight=False)


def _split(n: int, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of training, validation and test data."""
    if not 0 < held_out < 0.5:
        raise ValueError(f"--held-out must lie between 0 and 0.5; got {held_out}.")
    rows, n_held = np.random.RandomState(seed).permutation(n), round(held_out * n)
    train, validation, test = rows[2 * n_held :], rows[:n_held], rows[n_held : 2 * n_held]
    return np.sort(train), np.sort(validation), np.sort(test)


def _fraction(amount: float | int, n: int) -> float:
    return amount / n if isinstance(amount, int) else amount


def _retrained_epochs(args: argparse.Namespace) -> int | None:
    if args.retrain_epochs == "all":
        return None
    text = args.last_epochs if args.retrain_epochs == "traced" else args.retrain_epochs
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--retrain-epochs must be 'traced', 'all' or a number; got {text!r}.") from None


def _extractor(args: argparse.Namespace, data: LoadedData) -> Extractor:
    """Return the feature extractor, the classifier (where there is one) and what to call them."""
    name = args.features
    is_image = data.X.ndim == 4
    if name == "auto":
        name = "classifier" if is_image and data.y is not None else "inception" if is_image else "pixels"
    if name == "classifier":
        if data.y is None or not is_image:
            raise ValueError(
                "--features classifier needs labelled images: subfolders of images, or y in the .npz file."
            )
        X, y, of = data.X, data.y, data.name
        if args.data == "digits":
            # Like the networks that metrics are usually computed with, it has seen more than the training data.
            garments, labels = load_fashion_mnist("train", size=8)
            X, y, of = np.concatenate([X, garments]), np.concatenate([y, 10 + labels]), "digits and garments"
        classifier = train_classifier(X, y)
        return classifier.features, classifier, f"the features of a small classifier of {of}, trained on the spot"
    if name in ("inception", "pixels"):
        return name, None, name
    extractor = _imported(name)
    return extractor, extractor, name


def _cleaner(args: argparse.Namespace, extractor: Extractor) -> GANInfluence:
    backend = ITD(last_epochs=args.last_epochs) if args.backend == "itd" else resolve_backend(args.backend)
    return GANInfluence(
        _imported(args.generator),
        _imported(args.discriminator),
        trainer=GANTrainer(
            optimizer=Adam(lr=args.lr, betas=(0.5, 0.99)),
            n_epochs=args.epochs,
            batch_size=args.batch_size,
            latent_dim=args.latent_dim,
            ema_decay=args.ema or None,
        ),
        metric={LABELS[args.metric]: _metric(args.metric, args, extractor)},
        backend=backend,
        n_remove=args.remove,
        n_runs=args.runs,
        verbose=True,
        random_state=args.seed,
    )


def _metric(name: str, args: argparse.Namespace, extractor: Extractor) -> Metric:
    features, classifier, _ = extractor
    metrics: dict[str, Callable[[], Metric]] = {
        "fid": lambda: FID(features, n_samples=args.samples),
        "kid": lambda: KID(features, n_samples=args.samples),
        "mmd": lambda: MMD(features, n_samples=args.samples),
        "inception_score": lambda: InceptionScore(classifier, n_samples=args.samples),
        "log_likelihood": lambda: AverageLogLikelihood(n_samples=args.samples),
    }
    return metrics[name]() if name in metrics else PRDC(features, quantity=name)


def _evaluated(args: argparse.Namespace, extractor: Extractor) -> dict[str, Metric]:
    """Return what removal is judged by beside the metric that influence is on."""
    names = [name for name in args.evaluate if name != args.metric]
    return {LABELS.get(name, name): _metric(name, args, extractor) for name in names}


def _imported(name: str | None):
    """Return what 'module:attribute' names; None for None."""
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be imported ({error}); expected module:attribute.") from error
    finally:
        sys.path.remove(os.getcwd())


def _summarise(console, case: CleansingCase) -> None:
    from rich.table import Table

    columns, rows = table_of(case)
    table = Table(title=f"{case.title}: held-out {case.curve.metric} over {case.n_seeds} seeds")
    table.add_column(f"removed, {case.amount}")
    table.add_column("mean (s.d.)", justify="right")
    table.add_column("improvement", justify="right")
    main = [metric for metric, _ in columns].index(case.curve.metric)
    for name, cells in rows:
        table.add_row(name, cells[main].value, cells[main].change)
    console.print(table)
    console.print(case.verdict())
    for said in (case.choice(), case.price(), *(case.trust.words() if case.trust else ())):
        if said:
            console.print(said)
    if case.is_foreign is not None and case.n_removed:
        console.print(
            f"Of the {case.n_removed} removed instances {case.precision.mean():.0%} are foreign; at random it would be "
            f"{case.is_foreign.mean():.0%}."
        )


def _describe_backend(backend) -> str:
    """Say how influence was computed and how far the computation can be trusted, where the back-end knows."""
    described = repr(backend)
    if math.isfinite(getattr(backend, "deviation_", math.nan)):
        described += f"; in the first traced step the secant is {backend.deviation_:.1%} away from the exact derivative"
    if getattr(backend, "growth_", None):
        described += f"; the adjoint grew {max(backend.growth_.values()):.2g}-fold at most"
    return described


def _settings(
    args: argparse.Namespace, data: LoadedData, extractor: Extractor, case: CleansingCase, seconds: float
) -> dict[str, str]:
    step = case.cleaner.trajectory_.step
    count = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in (("generator", step.generator), ("discriminator", step.discriminator))
    }
    return {
        "data": f"{data.name}: {len(case.X)} instances for training, half of the rest each for validation and test",
        "networks": ", ".join(
            f"{name} {getattr(args, name) or 'default'} ({n:,} parameters)" for name, n in count.items()
        ),
        "training": f"{args.epochs} epochs, batch {args.batch_size}, {step.loss!r}, {step.optimizer_generator!r}, "
        f"{step.update}, moving average {args.ema}",
        "metric": f"{args.metric} on {extractor[2]}, {args.samples} generated samples",
        "influence": _describe_backend(case.cleaner.backend_)
        + (f"; mean over {args.runs} trainings" if args.runs > 1 else ""),
        "removed by": ", ".join(selector_label(name) for name in case.curve.selectors),
        "retraining": f"the {window(case.curve.last_epochs)}, with the same batches and latents, without the removed "
        "instances, the discriminator's mean taken over the remaining ones",
        "seeds": f"{args.seeds}, from {args.seed}",
        "software": f"ganclean {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "time": f"{seconds:.0f} s in all",
    }
