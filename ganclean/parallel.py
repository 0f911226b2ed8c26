"""Independent jobs side by side, on whatever joblib reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from joblib import Parallel, delayed
from joblib.parallel import get_active_backend

from ganclean.progress import Progress


def side_by_side(
    function: Callable[..., Any],
    jobs: Sequence[tuple],
    n_jobs: int | None = None,
    progress: Progress | None = None,
    name: str = "",
) -> list[Any]:
    """Return what a function returns for each job's arguments, in their order.

    Parameters
    ----------
    function : callable
    jobs : sequence of tuple
        The arguments of each call.
    n_jobs : int, optional
        As in scikit-learn: None is 1, or what an enclosing ``joblib.parallel_config`` says, which also chooses where
        the jobs run: processes of this machine, Dask, Ray or any other back-end that is registered with joblib.
    progress : callable, optional
        Called with (name, jobs done, jobs in all): after each job, or, where the back-end returns all results
        together (Ray's does), at the end.
    name : str, default=""
        What the progress is called.
    """
    settings: dict[str, Any] = {
        "return_as": "generator" if get_active_backend()[0].supports_return_generator else "list"
    }
    # Left out, since joblib 1.3.0 takes None for 1 where a configuration says otherwise.
    if n_jobs is not None:
        settings["n_jobs"] = n_jobs
    results = []
    for result in Parallel(prefer="processes", **settings)(delayed(function)(*job) for job in jobs):
        results.append(result)
        if progress is not None:
            progress(name, len(results), len(jobs))
    return results
