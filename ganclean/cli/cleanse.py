"""``ganclean cleanse``: find harmful instances, remove them, and prove that it helped."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from ganclean._version import __version__
from ganclean.backends import ITD, resolve_backend
from ganclean.cleansing import GANInfluence
from ganclean.cleansing.removal import RATES
from ganclean.cli import options
from ganclean.datasets import contaminate, load_fashion_mnist
from ganclean.files import LoadedData
from ganclean.metrics import FID, KID, MMD, PRDC, AverageLogLikelihood, InceptionScore
from ganclean.metrics.base import Metric
from ganclean.metrics.prdc import QUANTITIES
from ganclean.plotting.style import selector_label
from ganclean.reporting import CleansingCase, window, write_report
from ganclean.reporting.table import table_of
from ganclean.validation import MetricPanel, cleansing_curve, metric_panel, trust_report
from ganclean.validation.panel import MIN_SAMPLES
from ganclean.validation.selectors import SELECTORS

LABELS = {
    "fid": "FID",
    "kid": "KID",
    "mmd": "MMD",
    "inception_score": "inception score",
    "log_likelihood": "log-likelihood",
}
EVALUATED = ["fid", "kid", *QUANTITIES]


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``ganclean cleanse``."""
    cleanse = options.new_command(commands, "cleanse", "find and remove harmful training instances", _cleanse)
    cleanse.add_argument("--metric", choices=list(LABELS), default="fid")
    cleanse.add_argument("--backend", default="itd", help="name of an influence back-end")
    cleanse.add_argument(
        "--remove",
        type=options.amount_or_auto,
        default=0.1,
        help="how much to remove: 5%%, 0.05, a count, or auto, which is what helps most on validation data",
    )
    options.add_networks(cleanse)
    options.add_training(cleanse)
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
        type=options.amount,
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


def _cleanse(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    if args.probes == 1 or args.probes < 0:
        raise ValueError(f"--probes must be 0 or at least 2; got {args.probes}.")
    console, data = options.opened(args)
    extractor = options.chosen_extractor(args, data)
    console.print(f"metric: {args.metric} on {extractor[2]}")
    train, validation, test = options.split_rows(len(data.X), args.held_out, args.seed)
    X = data.X[train]
    inputs: list[tuple[str, np.ndarray, np.ndarray | None]] = [(data.name, X, None)]
    if args.data == "digits":
        foreign, _ = load_fashion_mnist("train", size=8)
        inputs.append(("digits, 10% replaced by garments", *contaminate(X, foreign, 0.1, args.seed)))
    cases = []
    for title, X, is_foreign in inputs:
        console.rule(title)
        cleanser = _cleanser(args, extractor)
        console.print(str(cleanser.estimate_cost(X)))
        cleanser.fit(X, X_val=data.X[validation])
        if args.jobs is None:
            args.jobs = 1 if torch.cuda.is_available() else min(args.seeds, os.cpu_count() or 1)
        curve = cleansing_curve(
            cleanser,
            data.X[test],
            [_fraction(r, len(X)) for r in args.rates or (RATES[1:] if args.remove == "auto" else (0.05, 0.1, 0.2))],
            selectors=["influence", *(name for name in args.selectors if name != "influence")],
            metrics=_evaluated(args, extractor),
            n_seeds=args.seeds,
            last_epochs=_retrained_epochs(args),
            n_jobs=args.jobs,
        )
        trust = trust_report(cleanser, n_probes=args.probes, n_jobs=args.jobs) if args.probes else None
        files = None if data.files is None else [data.files[i] for i in train]
        case = CleansingCase(title, X, train, cleanser, curve, trust, is_foreign, files)
        case = replace(case, panels=_panels(case, data.X[test], extractor))
        _summarise(console, case)
        cases.append(case)
    seconds = time.perf_counter() - begin
    page = write_report(args.report, cases, _settings(args, data, extractor, cases[0], seconds))
    console.print(f"report: [bold]{page}[/]  ({seconds:.0f} s)")
    return 0


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


def _cleanser(args: argparse.Namespace, extractor: options.Extractor) -> GANInfluence:
    backend = ITD(last_epochs=args.last_epochs) if args.backend == "itd" else resolve_backend(args.backend)
    return GANInfluence(
        options.imported(args.generator),
        options.imported(args.discriminator),
        trainer=options.trainer_of(args),
        metric={LABELS[args.metric]: _metric(args.metric, args, extractor)},
        backend=backend,
        n_remove=args.remove,
        n_runs=args.runs,
        verbose=True,
        random_state=args.seed,
    )


def _metric(name: str, args: argparse.Namespace, extractor: options.Extractor) -> Metric:
    features, classifier, _ = extractor
    metrics: dict[str, Callable[[], Metric]] = {
        "fid": lambda: FID(features, n_samples=args.samples),
        "kid": lambda: KID(features, n_samples=args.samples),
        "mmd": lambda: MMD(features, n_samples=args.samples),
        "inception_score": lambda: InceptionScore(classifier, n_samples=args.samples),
        "log_likelihood": lambda: AverageLogLikelihood(n_samples=args.samples),
    }
    return metrics[name]() if name in metrics else PRDC(features, quantity=name)


def _evaluated(args: argparse.Namespace, extractor: options.Extractor) -> dict[str, Metric]:
    """Return what removal is judged by beside the metric that influence is on."""
    names = [name for name in args.evaluate if name != args.metric]
    return {LABELS.get(name, name): _metric(name, args, extractor) for name in names}


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


def _panels(case: CleansingCase, X_test: np.ndarray, extractor: options.Extractor) -> dict[str, MetricPanel] | None:
    """Return one metric of each family before and after removal; None where there are too few held-out data."""
    if len(X_test) < 2 * MIN_SAMPLES:
        return None
    features, classifier, _ = extractor
    return {
        name: metric_panel(
            case.samples(name, len(X_test)), X_test, case.X, feature_extractor=features, classifier=classifier
        )
        for name in ("none", "influence")
    }


def _describe_backend(backend) -> str:
    """Say how influence was computed and how far the computation can be trusted, where the back-end knows."""
    described = repr(backend)
    if math.isfinite(getattr(backend, "deviation_", math.nan)):
        described += f"; in the first traced step the secant is {backend.deviation_:.1%} away from the exact derivative"
    if getattr(backend, "growth_", None):
        described += f"; the adjoint grew {max(backend.growth_.values()):.2g}-fold at most"
    return described


def _settings(
    args: argparse.Namespace, data: LoadedData, extractor: options.Extractor, case: CleansingCase, seconds: float
) -> dict[str, str]:
    step, trainer = case.cleanser.trajectory_.step, case.cleanser.trainer_
    count = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in (("generator", step.generator), ("discriminator", step.discriminator))
    }
    return {
        "data": f"{data.name}: {len(case.X)} instances for training, half of the rest each for validation and test",
        "networks": ", ".join(
            f"{name} {getattr(args, name) or 'default'} ({n:,} parameters)" for name, n in count.items()
        ),
        "training": f"{args.epochs} epochs, batch {args.batch_size}, {trainer.loss}, {trainer.optimizer!r}, "
        f"{trainer.update}, moving average {args.ema}",
        "metric": f"{args.metric} on {extractor[2]}, {args.samples} generated samples",
        "influence": _describe_backend(case.cleanser.backend_)
        + (f"; mean over {args.runs} trainings" if args.runs > 1 else ""),
        "removed by": ", ".join(selector_label(name) for name in case.curve.selectors),
        "retraining": f"the {window(case.curve.last_epochs)}, with the same batches and latents, without the removed "
        "instances, the discriminator's mean taken over the remaining ones",
        "seeds": f"{args.seeds}, from {args.seed}",
        "software": f"ganclean {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "time": f"{seconds:.0f} s in all",
    }
