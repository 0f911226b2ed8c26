"""The gallery's scripts run by themselves, as the site's builder runs them."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_a_title_and_shows_a_figure_of_the_library(path):
    source = path.read_text()
    tree = ast.parse(source)
    title, underline, *_ = ast.get_docstring(tree).splitlines()
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert path.name.startswith("plot_")
    assert underline == "=" * len(title)
    assert "ganclean.plotting" in imported and "plt.show()" in source and "\n# %%\n" in source


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs(path, tmp_path):
    if path.stem == "plot_cluster":
        pytest.importorskip("distributed")
    if path.stem == "plot_pipeline":
        pytest.importorskip("imblearn")
    result = subprocess.run(
        [sys.executable, str(path)],
        env=os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout and not list(tmp_path.iterdir())
