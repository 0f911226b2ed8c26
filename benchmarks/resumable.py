"""Results that survive an interrupt: a finished row is in the file at once, and not computed again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.environment import write_results


class Rows:
    """The rows of a benchmark, beside the file that holds them.

    Parameters
    ----------
    path : str, optional
        Where the rows are, or will be; in memory alone where it is not given.
    """

    def __init__(self, path: str | None):
        self.path = path
        found = path is not None and Path(path).exists()
        self.rows: list[dict] = json.loads(Path(path).read_text())["results"]["rows"] if path and found else []

    def having(self, key: dict) -> list[dict]:
        """Return the rows that have all the values of a key."""
        return [row for row in self.rows if key.items() <= row.items()]

    def add(self, row: dict) -> None:
        """Add a row, so that an interrupt leaves the old file or the new one, never half of it."""
        self.rows.append(row)
        if self.path is not None:
            write_results(self.path + ".part", {"rows": self.rows})
            Path(self.path + ".part").replace(self.path)

    def once(self, key: dict, compute: Callable[[], dict]) -> dict:
        """Return the row of a key, computed where there is none yet."""
        found = self.having(key)
        if not found:
            begin = time.perf_counter()
            found = [{**key, **compute()}]
            self.add(found[0])
            named = ", ".join(f"{name} {value}" for name, value in key.items() if isinstance(value, str | int))
            print(f"{named}: {time.perf_counter() - begin:.0f} s", flush=True)
        return found[0]
