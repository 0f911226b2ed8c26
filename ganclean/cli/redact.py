"""``ganclean redact``: make a trained GAN stop producing certain samples."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.base import clone
from torch import nn

from ganclean._version import __version__
from ganclean.cli import options
from ganclean.dynamics.randomness import seeded
from ganclean.files import LoadedData
from ganclean.metrics import train_classifier
from ganclean.networks import default_pair
from ganclean.redaction import (
    AnyOf,
    ClassifierCriterion,
    Criterion,
    GANRedactor,
    SampleCriterion,
)
from ganclean.redaction.criteria import as_criterion
from ganclean.redaction.redactor import METHODS
from ganclean.reporting.redaction import write_redaction
from ganclean.training.pretraining import train_gan

Pair = tuple[nn.Module, nn.Module]


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``ganclean redact``."""
    redact = options.new_command(commands, "redact", "make a trained GAN stop producing certain samples", run)
    what = redact.add_argument_group("what is not to be generated (one of these)").add_mutually_exclusive_group(
        required=True
    )
    what.add_argument("--label", type=int, nargs="+", help="the data with these labels")
    what.add_argument("--samples", metavar="FILE", help="an .npy array of known samples")
    what.add_argument(
        "--criterion",
        metavar="MODULE:OBJECT",
        help="a function that is true for valid samples, a classifier or a Criterion",
    )
    how = redact.add_argument_group("redaction")
    how.add_argument("--method", choices=METHODS, default="auto")
    how.add_argument("--lam", type=float, default=0.8, help="weight of generated samples among the fakes")
    how.add_argument("--redaction-epochs", type=int, default=5)
    how.add_argument("--redaction-lr", type=float, default=5e-4)
    how.add_argument("--held-out", type=float, default=0.2, help="fraction of the data that the report compares with")
    how.add_argument(
        "--weights", metavar="FILE", help="safetensors of a trained pair, as this command writes; else one is trained"
    )
    options.add_networks(redact)
    options.add_training(redact)


def run(args: argparse.Namespace) -> int:
    """Train a GAN or read one, redact it, and write the report and the networks."""
    begin = time.perf_counter()
    console, data = options.opened(args)
    train, _, test = options.split_rows(len(data.X), args.held_out, args.seed)
    criterion, excluded = _criterion(args, data, train)
    extractor = options.chosen_extractor(args, data)
    pair = _pair(args, data.X[train])
    trainer = clone(options.trainer_of(args)).set_params(
        n_epochs=args.redaction_epochs, optimizer__lr=args.redaction_lr
    )
    redactor = GANRedactor(
        *pair, criterion, method=args.method, lam=args.lam, trainer=trainer, verbose=True, random_state=args.seed
    ).fit(data.X[train])
    report = redactor.report(data.X[test][~excluded[test]], feature_extractor=extractor[0])
    console.print(str(report))
    n_invalid = int((~redactor.support_).sum())
    settings = {
        "data": f"{data.name}: {len(data.X)} instances, {len(train)} of them for training; redaction left out "
        f"{n_invalid} invalid ones",
        "not to be generated": _described(args),
        "networks": f"read from {args.weights}" if args.weights else f"trained for {args.epochs} epochs before",
        "redaction": f"method {redactor.method_}, λ = {args.lam:g}, {args.redaction_epochs} epochs of Adam with "
        f"learning rate {args.redaction_lr:g}: {report.n_steps} steps",
        "queries": f"{report.n_queries} judged instances and samples",
        "compared with": f"{int((~excluded[test]).sum())} held-out valid instances; distances in {extractor[2]}",
        "software": f"ganclean {__version__}, torch {torch.__version__}",
        "time": f"{time.perf_counter() - begin:.0f} s in all",
    }
    page = write_redaction(args.report, data.name, redactor, report, settings)
    console.print(f"report: [bold]{page}[/]")
    return 0


def _described(args: argparse.Namespace) -> str:
    """Say what the options exclude."""
    if args.label is not None:
        return f"label {' or '.join(map(str, args.label))}"
    return f"what the samples in {args.samples} stand for" if args.samples else f"what {args.criterion} refuses"


def _criterion(args: argparse.Namespace, data: LoadedData, train: np.ndarray) -> tuple[Criterion, np.ndarray]:
    """Return the criterion, and which rows of the data it excludes."""
    if args.label is None:
        given: Any = np.load(args.samples) if args.samples is not None else options.imported(args.criterion)
        known = as_criterion(given)
        return known, ~known.keeps(data.X)
    if data.y is None:
        raise ValueError("--label needs labelled data: subfolders of images, or y in the .npz file.")
    excluded = np.isin(data.y, args.label)
    if not excluded[train].any():
        raise ValueError(f"No training instance has the label {' or '.join(map(str, args.label))}.")
    criterion: Criterion = SampleCriterion(data.X[train][excluded[train]])
    if data.X.ndim == 4:
        classifier = train_classifier(data.X, data.y)
        criterion = AnyOf([criterion, ClassifierCriterion(classifier, invalid_class=args.label)])
    return criterion, excluded


def _pair(args: argparse.Namespace, X: np.ndarray) -> Pair:
    """Return the trained generator and discriminator."""
    made = [options.imported(name) for name in (args.generator, args.discriminator)]
    with seeded(args.seed):
        defaults = default_pair(X.shape[1:], args.latent_dim)
        generator, discriminator = (d if make is None else make(X.shape[1:]) for make, d in zip(made, defaults))
    if args.weights is None:
        trainer = options.trainer_of(args)
        generator, judge = train_gan(
            X, generator=generator, discriminator=discriminator, trainer=trainer, random_state=args.seed
        )
        assert judge is not None
        return generator, judge
    weights = load_file(args.weights)
    for player, module in (("generator", generator), ("discriminator", discriminator)):
        prefix = f"{player}."
        try:
            module.load_state_dict({k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)})
        except RuntimeError as error:
            raise ValueError(f"The weights in {args.weights!r} do not fit the {player}: {error}") from error
    return generator, discriminator
