"""How pictures look and are written, and the picture of a trace."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

INK, MUTED, RULE = "#1f2328", "#656d76", "#d8dee4"
BASE, STEERED, CONTROL = "#e8833a", "#2f6fdb", "#a0a7b0"
PARTS = ("#a0a7b0", "#2f6fdb", "#8fb4f2", "#e8833a", "#5aa469", "#d8dee4")
STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
}


def plot_trace(
    t: Float[np.ndarray, "K"],
    strength: Float[np.ndarray, "N K"],
    gradient_norm: Float[np.ndarray, "N K"],
    value: Float[np.ndarray, "N K"],
    value_std: Float[np.ndarray, "N K"],
    displacement: Float[np.ndarray, "M"] | None = None,
    *,
    path: str | Path,
) -> Path:
    """Draw what steering did along the flow: medians over N actions, with 10 to 90 % bands.

    The strength has a panel only where it varies; ``match_norm`` fixes it, and the caption then names it.

    Args:
        t: paper times of the guided steps.
        strength: norm of the guidance over norm of the velocity.
        gradient_norm: norm of the critic's gradient.
        value: mean of the ensemble at the denoised action.
        value_std: spread of the ensemble there.
        displacement: of M actions from their unsteered twins, root mean square per entry.
        path: of the picture; its suffix says the format.

    Raises:
        ValueError: there is no action or no step.
        ModuleNotFoundError: matplotlib is not installed.
    """
    panels = {
        "norm of the critic's gradient": gradient_norm,
        "critic's value": value,
        "spread of its ensemble": value_std,
    }
    if not len(t) or any(panel.size == 0 for panel in (strength, *panels.values())):
        raise ValueError("trace: expected a guided action, got none; sample with a rule and trace=Trace()")
    low, high = np.nanmin(strength), np.nanmax(strength)
    constant = high - low <= 0.01 * high
    if not constant:
        panels = {"guidance / velocity": strength, **panels}
    caption = f"line: median of {len(strength)} actions; band: 10 to 90 % of them"
    if constant:
        caption = f"guidance = {np.nanmedian(strength):.2g} × velocity at every step; {caption}"
    if displacement is not None and displacement.size:
        low, median, high = np.nanquantile(displacement, [0.1, 0.5, 0.9])
        caption += f"; actions moved by {median:.2g} per entry ({low:.2g} to {high:.2g}) in all"
    plt = load_pyplot()
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, len(panels), figsize=(9.6, 2.7), layout="constrained")
        for ax, (name, panel) in zip(axes, panels.items(), strict=True):
            low, median, high = np.nanquantile(panel, [0.1, 0.5, 0.9], axis=0)
            ax.fill_between(t, low, high, color=STEERED, alpha=0.16, linewidth=0)
            ax.plot(t, median, color=STEERED, linewidth=2, solid_capstyle="round")
            add_title(ax, name)
            ax.set(xlim=(0, 1))
            ax.set_xticks([0, 0.5, 1], ["noise", "t = 0.5", "action"])
            ax.locator_params(axis="y", nbins=4)
            if panel is not value:  # the others are not negative
                ax.set_ylim(0, 1.2 * np.nanmax(high) or 1)
        add_caption(fig, caption)
        return save(fig, path)


def add_title(ax: Any, text: str) -> None:
    """Set the title of a panel."""
    ax.set_title(text, loc="left", fontsize=10, fontweight="bold")


def add_caption(fig: Any, text: str) -> None:
    """Say below a picture what its lines and bands are."""
    fig.supxlabel(text, x=0.008, ha="left", fontsize=8.5, color=MUTED)


def save(fig: Any, path: str | Path) -> Path:
    """Write a figure, whose suffix says the format, and close it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    load_pyplot().close(fig)
    return path


def load_pyplot() -> Any:
    """Import matplotlib for writing files alone.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('plots need matplotlib: pip install "qsteer[plots]"') from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
