"""One colour and one marker for each method, in every picture, which colour-blind people tell apart (Okabe and Ito).

A method that is not listed is drawn as `OTHER`.
"""

from typing import NamedTuple


class Look(NamedTuple):
    """How a method is drawn.

    Attributes:
        colour: hexadecimal.
        marker: of matplotlib.
        shape: the same of Vega-Lite.
    """

    colour: str
    marker: str
    shape: str


MODEL, PLAN, FRONT = "full", "plan", "front"  # the model itself, what was chosen for it, and what else was found
LOOKS = {
    MODEL: Look("#7f7f7f", "o", "circle"),
    PLAN: Look("#d55e00", "D", "diamond"),
    FRONT: Look("#0072b2", "o", "circle"),
    "schedule": Look("#0072b2", "o", "circle"),
    "strategy + schedule": Look("#d55e00", "D", "diamond"),
    "from files": Look("#d55e00", "*", "diamond"),
    "Neighbours": Look("#56b4e9", "s", "square"),
    "ToMe": Look("#009e73", "^", "triangle-up"),
    "POMT": Look("#cc79a7", "v", "triangle-down"),
    "top-k": Look("#8c6d1f", "P", "cross"),
    "random drop": Look("#999999", "X", "cross"),
    "VWT paper": Look("#e69f00", "<", "triangle-left"),
    "padded": Look("#b8860b", ">", "triangle-right"),
    "ATC": Look("#882255", "h", "circle"),
    "DiffRate": Look("#117733", "d", "diamond"),
    "PPT": Look("#332288", "p", "square"),
    "PiToMe": Look("#44aa99", "*", "triangle-up"),
    "quantised": Look("#000000", "P", "stroke"),
}
OTHER = Look("#4d4d4d", "p", "circle")


def look(method: str) -> Look:
    """How a method is drawn."""
    return LOOKS.get(method, OTHER)


def ink(method: str) -> str:
    """The colour of a text about a method: darker than its points, to be read on white."""
    red, green, blue = (int(look(method).colour[at : at + 2], 16) * 7 // 10 for at in (1, 3, 5))
    return f"#{red:02x}{green:02x}{blue:02x}"
