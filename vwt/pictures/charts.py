"""Charts of profiles and utilities. Needs matplotlib: `pip install vwt[plots]`."""

import os
from collections.abc import Mapping

from vwt.pictures.figures import save_figure, subplots
from vwt.tuning.profile import LatencyProfile
from vwt.tuning.schedule import down_to, utility


def plot_profile(path: str | os.PathLike[str], profile: LatencyProfile) -> None:
    """Draw the latency of a block over tokens, its knees, and predicted against measured forwards.

    Raises:
        ArgumentError: if matplotlib is not installed.
        DocumentError: if the file cannot be written.
    """
    figure, axes = subplots(1, 2, size=(5.5, 4.2))
    left, right = axes[0]
    left.plot(profile.counts, profile.block, marker=".", label="one block")
    left.plot(profile.counts, profile.attention, marker=".", label="of that, up to its attention")
    left.plot(profile.counts, profile.counting, linestyle=":", label="one block after a merge")
    for count in profile.knees():
        left.axvline(count, color="0.7", linestyle="--", linewidth=1)
        left.annotate(f"{count}", (count, 0), fontsize=8, color="0.4", ha="center")
    left.set(xlabel="tokens (dashed: knees)", ylabel="milliseconds a batch", ylim=(0, None))
    left.legend(fontsize=8)
    measured, predicted = ([check[name] for check in profile.checks] for name in ("measured", "predicted"))
    right.plot([0, max(measured, default=1)], [0, max(measured, default=1)], color="0.7", linewidth=1)
    right.plot(measured, predicted, "o")
    right.set(xlabel="measured forward, ms", ylabel="predicted, ms", title=f"median error {100 * profile.error:.1f} %")
    machine = profile.machine
    figure.suptitle(
        f"{profile.model}, batch {profile.batch_size}, {profile.dtype}\n{machine['cpu']}, {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}",
        fontsize=8,
    )
    save_figure(figure, path, dpi=120)


def plot_utility(
    path: str | os.PathLike[str], profile: LatencyProfile, accuracy: Mapping[int, float], alpha: float, block: int
) -> None:
    """Draw latency, accuracy and utility over the tokens that are left, and the choice.

    Raises:
        ArgumentError: if matplotlib is not installed.
        DocumentError: if the file cannot be written.
    """
    curve = utility(profile, accuracy, alpha, block)
    counts = list(curve)
    latency = [profile.predict(down_to(profile, block, n)) / profile.predict() for n in counts]
    figure, axes = subplots(1, 1, size=(6.5, 4.2))
    axes = axes[0][0]
    axes.plot(counts, latency, label="latency, of the full model's")
    axes.plot(counts, [accuracy[n] for n in counts], marker=".", label="accuracy under random removal")
    axes.plot(counts, [curve[n] for n in counts], marker="o", label=f"utility, alpha {alpha:g}")
    best = max(curve, key=lambda n: (curve[n], n))
    axes.axvline(best, color="0.7", linestyle="--", linewidth=1)
    axes.set(xlabel=f"tokens left after block {block}", ylim=(0, None), title=f"{profile.model}: {best} tokens")
    axes.legend(fontsize=8)
    save_figure(figure, path, dpi=120)
