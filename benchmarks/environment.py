"""Results as JSON, with the environment that they were measured in."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy
import sklearn
import torch

import ganclean


def write_results(path: str | None, results: dict) -> None:
    """Write results and environment to a file; do nothing where no path is given."""
    if path is None:
        return
    environment = {
        "ganclean": ganclean.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")
