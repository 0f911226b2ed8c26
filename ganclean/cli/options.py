"""Options that the commands share: data, networks, training, feature extractors."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ganclean.datasets import load_fashion_mnist
from ganclean.exceptions import missing_extra
from ganclean.files import LoadedData, read_data
from ganclean.metrics import train_classifier
from ganclean.optim import Adam
from ganclean.training.trainer import GANTrainer

Extractor = tuple[Any, Any, str]
"""A feature extractor, the classifier that it belongs to (where there is one), and what to call them."""


def new_command(
    commands: argparse._SubParsersAction, name: str, what: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """Add a command, with what it reads and where its report goes."""
    command = commands.add_parser(name, help=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.set_defaults(run=run)
    command.add_argument("data", help="'digits', a folder of images, an .npy array or an .npz archive with X (and y)")
    command.add_argument("--image-size", type=int, help="resize a folder's images")
    command.add_argument("--report", default="report", help="folder for the report")
    command.add_argument("--seed", type=int, default=0)
    return command


def add_networks(command: argparse.ArgumentParser) -> None:
    """Add the networks and the feature extractor."""
    networks = command.add_argument_group("networks")
    networks.add_argument("--generator", metavar="MODULE:FUNCTION", help="from the shape of an instance to a module")
    networks.add_argument("--discriminator", metavar="MODULE:FUNCTION")
    networks.add_argument(
        "--features",
        default="auto",
        metavar="NAME",
        help="feature extractor of the metric: classifier (trained on the labels), inception, pixels or MODULE:OBJECT; "
        "auto takes a classifier where there are labels",
    )


def add_training(command: argparse.ArgumentParser) -> None:
    """Add how a GAN is trained."""
    training = command.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=25)
    training.add_argument("--batch-size", type=int, default=50)
    training.add_argument("--latent-dim", type=int, default=16)
    training.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    training.add_argument("--ema", type=float, default=0.99, help="decay of the generator's moving average")


def trainer_of(args: argparse.Namespace) -> GANTrainer:
    """Return the trainer that the options describe."""
    return GANTrainer(
        optimizer=Adam(lr=args.lr, betas=(0.5, 0.99)),
        n_epochs=args.epochs,
        batch_size=args.batch_size,
        latent_dim=args.latent_dim,
        ema_decay=args.ema or None,
    )


def amount(text: str) -> float | int:
    """Return a fraction from '5%' or '0.05', or a count from '50'."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a percentage, a fraction or a count; got {text!r}") from None


def amount_or_auto(text: str) -> float | int | str:
    try:
        return text if text == "auto" else amount(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a percentage, a fraction, a count or auto; got {text!r}") from None


def opened(args: argparse.Namespace) -> tuple[Any, LoadedData]:
    """Return the console and the data, and say what they are."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise missing_extra("rich", "cli") from error
    console, data = Console(highlight=False), read_data(args.data, args.image_size)
    console.print(f"[bold]{data.name}[/]: {len(data.X)} instances of shape {data.X.shape[1:]}")
    return console, data


def split_rows(n: int, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of training, validation and test data."""
    if not 0 < held_out < 0.5:
        raise ValueError(f"--held-out must lie between 0 and 0.5; got {held_out}.")
    rows, n_held = np.random.RandomState(seed).permutation(n), round(held_out * n)
    train, validation, test = rows[2 * n_held :], rows[:n_held], rows[n_held : 2 * n_held]
    return np.sort(train), np.sort(validation), np.sort(test)


def chosen_extractor(args: argparse.Namespace, data: LoadedData) -> Extractor:
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
    extractor = imported(name)
    return extractor, extractor, name


def imported(name: str | None):
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
