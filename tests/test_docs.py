"""The code in README and in the pages of the site runs, and the reference of the site is complete."""

import doctest
import importlib
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from ganclean import GANInfluence, GANTrainer
from ganclean.backends import ITD
from ganclean.datasets import load_digits_images
from ganclean.metrics import FID, train_classifier

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "how_to").glob("*.md"))]
# Blocks that are marked "python no-run" in their page: they need a cluster, or a recording that was interrupted.
NOT_RUN = {"clusters.md": 2, "own_loop.md": 1, "proof.md": 1}
# What is smaller here than on the pages.
SMALLER = {
    r"\b(n_epochs|last_epochs)=\d+": r"\1=1",
    r"\b(n_seeds|n_probes)=\d+": r"\1=2",
    r"\bn_instances=\d+": "n_instances=5",
    r"\bgroup_size=\d+": "group_size=4",
    r"\bn_samples=\d+": "n_samples=80",
    r"\bn_jobs=\d+": "n_jobs=1",
    r"\brates=\[.*?\]": "rates=[0.05, 0.1]",
    r"X\[:1079\], X\[1079:1438\], X\[1438:\]": "X[:96], X[96:176], X[176:256]",
    r"y\[:1079\]": "y[:96]",
    # The reader's own update.
    r"\.\.\.  # your own update, unchanged": "own_update(x)",
}
MODULES = [
    "ganclean",
    "ganclean.augmentation",
    "ganclean.backends",
    "ganclean.cleansing",
    "ganclean.datasets",
    "ganclean.exceptions",
    "ganclean.losses",
    "ganclean.metrics",
    "ganclean.networks",
    "ganclean.optim",
    "ganclean.plotting",
    "ganclean.recipes",
    "ganclean.redaction",
    "ganclean.reporting",
    "ganclean.validation",
    "ganclean.valuation",
]


def stand_ins() -> dict:
    """Return small things under the names that the pages use for the reader's own."""
    torch.manual_seed(0)
    X, y = load_digits_images()
    G = nn.Sequential(nn.Linear(64, 16), nn.SiLU(), nn.Linear(16, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
    D = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.SiLU(), nn.Linear(16, 1))
    opt_g, opt_d = (torch.optim.Adam(network.parameters(), lr=1e-3) for network in (G, D))
    features = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
    trainer = GANTrainer(n_epochs=1, latent_dim=64)

    def own_update(x):
        fake = G(torch.randn(len(x), 64))
        opt_d.zero_grad()
        (softplus(-D(x)).mean() + softplus(D(fake.detach())).mean()).backward()
        opt_d.step()
        opt_g.zero_grad()
        softplus(-D(fake)).mean().backward()
        opt_g.step()

    def is_bright(samples):
        return np.asarray(samples).mean(axis=(1, 2, 3)) > -0.45

    cleanser = GANInfluence(G, D, trainer=trainer, metric=FID(features), backend=ITD(), random_state=0)
    return {
        "G": G,
        "D": D,
        "generator": G,
        "discriminator": D,
        "opt_g": opt_g,
        "opt_d": opt_d,
        "own_update": own_update,
        "trainer": trainer,
        "cleanser": cleanser.fit(X[:96], X_val=X[96:176]),
        "my_features": features,
        "my_classifier": train_classifier(X[:96], y[:96]),
        "is_valid": is_bright,
        "another_judge": is_bright,
        "X": X[:96],
        "y": y[:96],
        "X_train": X[:96],
        "X_val": X[96:176],
        "X_test": X[176:320],
        "X_new": X[320:352],
        "y_new": y[320:352],
        "held_out": X[176:320],
        "samples": X[352:432],
        "new_samples": X[432:442],
        "y_gen": y[352:432],
        "dataset": Images(torch.from_numpy(X[:96])),
        "DataLoader": DataLoader,
        "n_epochs": 1,
    }


class Images(TensorDataset):
    """A Dataset that returns images instead of tuples."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0]


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """Return the info string, the line and the text of each block of Python on a page."""
    text = page.read_text(encoding="utf8")
    found = re.finditer(r"^```(python.*)\n([\s\S]*?)^```$", text, flags=re.MULTILINE)
    return [(match[1], text.count("\n", 0, match.start(2)), match[2]) for match in found]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.stem)
def test_code_on_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__", **stand_ins()}
    for info, line, code in blocks(page):
        if info == "python no-run":
            continue
        for pattern, smaller in SMALLER.items():
            code = re.sub(pattern, smaller, code)
        # Empty lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
    plt.close("all")


def test_only_listed_blocks_are_left_out():
    marked = {page.name: sum(info == "python no-run" for info, _, _ in blocks(page)) for page in PAGES}
    assert {name: n for name, n in marked.items() if n} == NOT_RUN
    assert {info for page in PAGES for info, _, _ in blocks(page)} <= {"python", "python no-run"}


def test_examples_with_a_prompt_print_what_the_page_says():
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed = [p.name for p in PAGES if doctest.testfile(str(p), module_relative=False, optionflags=flags).failed]
    assert not failed


def public_names(module) -> set[str]:
    """Return what `__all__` names, or else what a module defines under a public name."""
    if hasattr(module, "__all__"):
        return {name for name in module.__all__ if not name.startswith("_")}
    return {n for n, v in vars(module).items() if n[0] != "_" and getattr(v, "__module__", None) == module.__name__}


def reference() -> dict[str, set[str]]:
    """Return the names that the pages of the reference list, by module."""
    listed: dict[str, set[str]] = {}
    for page in (DOCS / "api").glob("*.rst"):
        module = ""
        for line in page.read_text(encoding="utf8").splitlines():
            if line.startswith(".. currentmodule::"):
                module = line.split("::")[1].strip()
            elif module and re.fullmatch(r"   \w+", line):
                listed.setdefault(module, set()).add(line.strip())
    return listed


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_in_the_reference(name):
    listed = set().union(*reference().values()) if name == "ganclean.cleansing" else reference()[name]
    assert public_names(importlib.import_module(name)) <= listed


def test_every_name_in_the_reference_exists():
    missing = [
        f"{m}.{n}" for m, names in reference().items() for n in names if not hasattr(importlib.import_module(m), n)
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf8"))
    broken = [link for link in links if not (page.parent / link).exists()]
    assert not broken
