"""``ganclean value``: which training instances do generated samples resemble?"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from ganclean._version import __version__
from ganclean.cli import options
from ganclean.files import read_data
from ganclean.reporting.valuation import summary, write_valuation
from ganclean.training.pretraining import train_gan
from ganclean.valuation import GMValuator
from ganclean.valuation.recall import RECALLS

REFINED = ("rerank", "quality")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``ganclean value``."""
    value = options.new_command(
        commands, "value", "credit training instances for the generated samples that resemble them", run
    )
    value.add_argument(
        "--samples",
        metavar="FILE",
        help="generated samples, read like the data; without them a GAN is trained on the data and makes as many",
    )
    credit = value.add_argument_group("credit")
    credit.add_argument("--neighbours", type=int, default=10, help="training instances that share a sample's credit")
    credit.add_argument("--recall", choices=RECALLS, default="exact", help="how neighbours are found")
    credit.add_argument("--rerank", choices=["l2", "lpips"], help="a finer distance among the candidates")
    credit.add_argument("--quality", choices=["realism"], help="let unrealistic samples give less credit")
    credit.add_argument(
        "--remove", type=options.amount, default=0.05, help="how many of least credit kept.npy leaves out"
    )
    options.add_networks(value)
    options.add_training(value)


def run(args: argparse.Namespace) -> int:
    """Value the data, and write the report."""
    begin = time.perf_counter()
    console, data = options.opened(args)
    features, _, described = options.chosen_extractor(args, data)
    console.print(f"similarity: distance in {described}")
    made: dict[str, np.ndarray] = {}
    generator = None
    if args.samples is None:
        networks = {name: options.imported(getattr(args, name)) for name in ("generator", "discriminator")}
        generator, _ = train_gan(data.X, trainer=options.trainer_of(args), random_state=args.seed, **networks)
    else:
        made["X_gen"] = read_data(args.samples, args.image_size).X
    valuator = GMValuator(
        generator,
        feature_extractor=features,
        k=args.neighbours,
        recall=args.recall,
        rerank=args.rerank,
        quality=args.quality,
        latent_dim=args.latent_dim,
        n_remove=args.remove,
        random_state=args.seed,
    ).fit(data.X, **made)
    console.print(summary(valuator))
    refined = "".join(f", {name} {value}" for name, value in vars(args).items() if name in REFINED and value)
    settings = {
        "data": f"{data.name}: {len(data.X)} instances",
        "samples": f"{len(valuator.quality_)}, "
        + (args.samples or f"of a GAN that was trained for {args.epochs} epochs on the data"),
        "similarity": f"distance in {described}",
        "credit": f"{args.neighbours} neighbours, {args.recall} recall{refined}, "
        f"temperature {valuator.temperature_:.3g}",
        "software": f"ganclean {__version__}, torch {torch.__version__}",
        "time": f"{time.perf_counter() - begin:.0f} s in all",
    }
    page = write_valuation(args.report, data.name, data.X, valuator, settings, data.files)
    console.print(f"report: [bold]{page}[/]")
    return 0
