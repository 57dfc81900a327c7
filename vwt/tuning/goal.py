"""What `tune` is asked for, and which of the points that were found reaches it."""

import math
from collections.abc import Mapping, Sequence

from vwt.errors import ArgumentError
from vwt.tuning.plan import Point, front_of

SLACK = 1.01  # of a budget, within which a measured latency is taken to keep it


def check_goal(ratio: float | None, milliseconds: float | None, agreement: float | None) -> dict[str, float]:
    """What of these is asked for, by name; raises ArgumentError for no goal, or one that is none."""
    goal = {"ratio": ratio, "milliseconds": milliseconds, "agreement": agreement}
    asked = {name: float(value) for name, value in goal.items() if value is not None}
    if not asked or {"ratio", "milliseconds"} <= set(asked):
        raise ArgumentError("tune needs a goal: ratio=… or milliseconds=…, or agreement=…, or one of each")
    for name, most in (("ratio", 1.0), ("milliseconds", math.inf), ("agreement", 1.0)):
        if name in asked and not 0 < asked[name] <= most:
            raise ArgumentError(f"{name} is {asked[name]:g}; expected a number above 0 and at most {most:g}")
    return asked


def choose(points: Sequence[Point], goal: Mapping[str, float]) -> Point:
    """The point of lowest KL within the budget; without one, the fastest that agrees enough."""
    agreed = [point for point in points if point.agreement >= goal.get("agreement", 0.0)]
    if "ratio" not in goal and "milliseconds" not in goal:
        return min(agreed, key=lambda point: point.milliseconds)
    within = [
        point
        for point in agreed
        if point.ratio <= SLACK * goal.get("ratio", math.inf)
        and point.milliseconds <= SLACK * goal.get("milliseconds", math.inf)
    ]
    if not within:
        front = "; ".join(
            f"ratio {p.ratio:.2f} ({p.milliseconds:.1f} ms): agreement {p.agreement:.3f}" for p in front_of(points)
        )
        raise ArgumentError(f"no plan reaches {dict(goal)}; what can be reached is {front}; ask for one of these")
    return min(within, key=lambda point: (point.kl, point.milliseconds))
