"""Importing ganclean is cheap, and its modules can be imported in any order."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ganclean

# What only some uses need, and the extras.
SELDOM_NEEDED = {
    *("PIL", "curvlinops", "distributed", "faiss", "jinja2", "matplotlib", "pandas", "rich"),
    *("sklearn.cluster", "sklearn.ensemble", "torch._dynamo", "torch._inductor", "torchmetrics", "torchvision"),
}
# Modules that the others are made of, and the command line.
INNER = {"cli", "files", "parallel", "progress", "tensors"}


def output_of(program: str) -> set[str]:
    """Run a program in a fresh interpreter and return the words that it prints."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_ganclean_alone_imports_no_other_package():
    loaded = output_of("import sys; before = set(sys.modules); import ganclean; print(*set(sys.modules) - before)")
    assert {"ganclean", "ganclean._version"} <= loaded
    assert not {name.split(".")[0] for name in loaded} - {"ganclean"} - sys.stdlib_module_names


def test_the_public_names_bring_no_more_than_pytorch_and_the_base_of_scikit_learn_do():
    loaded = output_of(
        "import sys, torch, sklearn.base; before = set(sys.modules)\n"
        "from ganclean import *\n"
        "print(*set(sys.modules) - before)"
    )
    assert "ganclean.cleansing.influence" in loaded
    assert not loaded & SELDOM_NEEDED


def test_public_names_and_packages_are_found_and_listed():
    for name in ganclean.__all__:
        assert getattr(ganclean, name) is getattr(ganclean, name)
    assert ganclean.GANInfluence.__name__ == "GANInfluence" and ganclean.metrics.FID.__name__ == "FID"
    assert {*ganclean.__all__, "metrics", "valuation"} <= set(dir(ganclean))
    with pytest.raises(AttributeError, match="module 'ganclean' has no attribute 'GANInfluences'"):
        ganclean.GANInfluences  # noqa: B018


def test_every_public_module_is_an_attribute():
    modules = {module.name for module in pkgutil.iter_modules(ganclean.__path__) if module.name[0] != "_"}
    assert set(ganclean._SUBMODULES) == modules - INNER


def test_every_module_can_be_the_first_that_is_imported():
    # What a package loads by itself need not be tried: whoever imports it first imports the package before it.
    output_of("""
import importlib, pkgutil, sys
import joblib, safetensors.torch, scipy.stats, sklearn.base, torch

def import_first(name):
    for loaded in [module for module in sys.modules if module.split(".")[0] == "ganclean"]:
        del sys.modules[loaded]
    importlib.import_module(name)

def import_all(package):
    import_first(package)
    path, loaded = sys.modules[package].__path__, set(sys.modules)
    for module in pkgutil.iter_modules(path, package + "."):
        if module.ispkg:
            import_all(module.name)
        elif module.name not in loaded:
            import_first(module.name)

import_all("ganclean")
""")
