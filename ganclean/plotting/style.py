"""Colours that the colour-blind tell apart (Okabe and Ito, 2008), and what things are called in figures and tables."""

from __future__ import annotations

from ganclean.exceptions import missing_extra

COLORS = {"harmful": "#d55e00", "helpful": "#0072b2", "none": "#1c1917", "faint": "#a8a29e"}

SELECTORS = {
    "influence": ("most harmful by influence", COLORS["harmful"], "o"),
    "discriminator_loss": ("harmful to the discriminator's loss", "#0072b2", "s"),
    "isolation_forest": ("isolation forest", "#009e73", "^"),
    "density": ("least probable (Gaussian)", "#cc79a7", "D"),
    "random": ("random", "#78716c", "v"),
}
FURTHER = (("#e69f00", "P"), ("#56b4e9", "X"), ("#f0e442", "*"))


def selector_label(selector: str) -> str:
    """Say in words what a selector removes."""
    if selector.startswith("influence:"):
        return f"most harmful to {selector.removeprefix('influence:')}"
    return SELECTORS[selector][0] if selector in SELECTORS else selector


def selector_style(selector: str, known: list[str]) -> tuple[str, str]:
    """Return the colour and the marker of one of the known selectors."""
    if selector in SELECTORS:
        return SELECTORS[selector][1:]
    others = [name for name in known if name not in SELECTORS]
    return FURTHER[others.index(selector) % len(FURTHER)]


def pyplot():
    """Return matplotlib's pyplot, or say what to install."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise missing_extra("matplotlib", "cli") from error
    return plt


def axes(ax, figsize=(5.6, 3.8)):
    """Return the given Axes, or those of a new figure, without the box around them."""
    if ax is None:
        ax = pyplot().subplots(figsize=figsize, layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax
