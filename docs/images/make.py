"""The pictures of the site; each function says which.

python docs/images/make.py                  # redaction.png, credit.png, agreement.png
python docs/images/make.py --report report  # report.png, of the page that `ganclean cleanse digits` wrote there
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ganclean import GANInfluence, GANTrainer, train_gan
from ganclean.backends import ITD
from ganclean.datasets import load_digits_images
from ganclean.metrics import FID, train_classifier
from ganclean.optim import Adam
from ganclean.plotting import AttributionDisplay, InfluenceScatterDisplay, RedactionDisplay
from ganclean.redaction import GANRedactor, SampleCriterion
from ganclean.validation import estimation_accuracy
from ganclean.valuation import GMValuator

HERE = Path(__file__).parent
X, y = load_digits_images()
X_train, y_train, X_val = X[:1079], y[:1079], X[1079:1438]


def save(display, name: str) -> None:
    """Write the figure of a display beside this script."""
    display.figure_.savefig(HERE / name, dpi=130, bbox_inches="tight")
    shrink(HERE / name)


def shrink(path: Path) -> None:
    """Write a picture anew in 128 colours, which takes a third of the space."""
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
    print(path.name)


def redaction_and_credit() -> None:
    """redaction.png: the same latents before and after the label 3 was redacted.

    credit.png: samples of that GAN before redaction, and the training digits that they owe most to.
    """
    classifier = train_classifier(X_train, y_train)
    trainer = GANTrainer(optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), n_epochs=60, latent_dim=16)
    generator, discriminator = train_gan(X_train, trainer=trainer, random_state=0)

    def is_valid(images):
        return classifier(torch.from_numpy(images)).argmax(dim=1) != 3

    threes = SampleCriterion(X_train[y_train == 3], match=is_valid)
    further = GANTrainer(optimizer=Adam(lr=5e-4, betas=(0.5, 0.99)), n_epochs=10, latent_dim=16)
    redactor = GANRedactor(generator, discriminator, threes, trainer=further, random_state=0).fit(X_train)
    save(RedactionDisplay.from_estimator(redactor, n_shown=20, n_columns=10), "redaction.png")

    features = classifier.features
    valuator = GMValuator(generator=generator, latent_dim=16, feature_extractor=features, random_state=0).fit(X_train)
    save(AttributionDisplay.from_estimator(valuator, X_train), "credit.png")


def agreement() -> None:
    """agreement.png: the tutorial's cleanser, predicted against really retrained, 60 random groups of 5%."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(32, 128), nn.SiLU(), nn.Linear(128, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 1))
    cleanser = GANInfluence(
        generator,
        discriminator,
        trainer=GANTrainer(n_epochs=25, latent_dim=32, ema_decay=0.99),
        metric=FID(train_classifier(X_train, y_train).features, n_samples=2000),
        backend=ITD(last_epochs=5),
        n_remove=0.1,
        random_state=0,
    ).fit(X_train, X_val=X_val)
    accuracy = estimation_accuracy(cleanser, n_instances=60, last_epochs=5, group_size=54)
    save(InfluenceScatterDisplay(accuracy, metric="FID", what="groups of 5%").plot(), "agreement.png")


def report(folder: str) -> None:
    """report.png: the upper part of the page that ``ganclean cleanse digits --report FOLDER`` wrote."""
    page = (Path(folder) / "index.html").resolve().as_uri()
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--hide-scrollbars"]
        picture = [f"--screenshot={HERE / 'report.png'}", "--window-size=1120,2460"]
        subprocess.run(["chromium", *options, *picture, page], check=True, capture_output=True)
    shrink(HERE / "report.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", metavar="FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.report:
        report(arguments.report)
    else:
        redaction_and_credit()
        agreement()
