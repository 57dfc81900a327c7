"""The charts of a report, as specifications of Vega-Lite made with Altair."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from vwt.pictures.palette import FRONT, MODEL, PLAN, look
from vwt.pictures.report.costs import Costs
from vwt.pictures.report.front import NAMES, Row

HEIGHT = 320  # pixels


def front_chart(rows: Sequence[Row], over: str, scale: str, batch_size: int) -> dict[str, Any]:
    """KL over latency ("milliseconds") or over "tokens".

    Args:
        rows: the model itself, the plan, the other points of its front, and what they are compared with.
        over: what is on the horizontal axis.
        scale: of KL, "linear" or "log"; the model itself, whose KL is 0, is left out of the latter.
        batch_size: images.
    """
    shown = [row for row in rows if getattr(row, over) is not None and (scale == "linear" or row.kl > 0)]
    titles = {
        "milliseconds": f"milliseconds a batch of {batch_size}",
        "tokens": "tokens an image, mean over the blocks",
    }
    values = [
        {
            "name": row.name, "method": row.label, over: getattr(row, over), "kl": row.kl,
            "KL, nats": f"{row.kl:.4f}", "agreement": f"{100 * row.agreement:.1f} %",
            "latency": f"{row.milliseconds:.2f} ms, {row.ratio:.2f} of the model's",
            "tokens, mean": "unknown" if row.tokens is None else f"{row.tokens:.0f}",
        }
        for row in shown
    ]  # fmt: skip
    methods = list(dict.fromkeys(row.method for row in shown))
    labels = [NAMES.get(method, method) for method in methods]
    looks = [look(method) for method in methods]
    x = alt.X(f"{over}:Q", title=titles[over], scale=alt.Scale(zero=False, nice=True))
    y = alt.Y("kl:Q", title="KL divergence from the model, nats", scale=alt.Scale(type=scale))  # type: ignore[arg-type]
    legend = alt.Legend(title=None, orient="bottom", columns=2, symbolSize=90)
    base = alt.Chart(alt.Data(values=values))
    points = base.mark_point(filled=True, opacity=1, size=110).encode(
        x=x,
        y=y,
        color=alt.Color("method:N", scale=alt.Scale(domain=labels, range=[own.colour for own in looks]), legend=legend),
        shape=alt.Shape("method:N", scale=alt.Scale(domain=labels, range=[own.shape for own in looks]), legend=legend),
        tooltip=["name:N", "KL, nats:N", "agreement:N", "latency:N", "tokens, mean:N"],
    )
    ours = f"datum.method == '{NAMES[PLAN]}' || datum.method == '{NAMES[FRONT]}' || datum.method == '{NAMES[MODEL]}'"
    line = base.transform_filter(ours).mark_line(strokeWidth=1.5, color=look(FRONT).colour).encode(x=x, y=y)
    chosen = base.transform_filter(f"datum.method == '{NAMES[PLAN]}'").encode(x=x, y=y)
    ring = chosen.mark_point(size=420, strokeWidth=2, color=look(PLAN).colour, tooltip=None)
    name = chosen.mark_text(dy=-20, fontSize=13, fontWeight="bold").encode(text=alt.value("chosen"))
    return _finished(line + ring + points + name)


def parts_chart(costs: Costs) -> dict[str, Any]:
    """Milliseconds of each part of a forward, without and with the plan."""
    values = [
        {
            "part": part.name, "run": NAMES[method], "ms": ms, "milliseconds": f"{ms:.2f}",
            "tokens that leave it": f"{part.tokens if method == PLAN else costs.tokens:.0f}",
        }
        for part in costs.parts
        for method, ms in ((MODEL, part.full), (PLAN, part.reduced))
    ]  # fmt: skip
    order = [part.name for part in costs.parts]
    labels, colours = ([NAMES[m] for m in (MODEL, PLAN)], [look(m).colour for m in (MODEL, PLAN)])
    bars = (
        alt.Chart(alt.Data(values=values))
        .mark_bar()
        .encode(
            x=alt.X("part:N", sort=order, title=None, axis=alt.Axis(labelAngle=-45)),
            xOffset=alt.XOffset("run:N", sort=labels),
            y=alt.Y("ms:Q", title="milliseconds"),
            color=alt.Color(
                "run:N",
                scale=alt.Scale(domain=labels, range=colours),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
            tooltip=["part:N", "run:N", "milliseconds:N", "tokens that leave it:N"],
        )
    )
    return _finished(bars)


def profile_chart(costs: Costs) -> dict[str, Any]:
    """Milliseconds of all blocks over tokens, and the counts that the plan has."""
    values = [{"tokens": n, "ms": ms, "milliseconds": f"{ms:.2f}"} for n, ms in costs.profile.items()]
    counts = [{"tokens": tokens} for tokens in sorted({part.tokens for part in costs.parts})]
    x = alt.X("tokens:Q", title="tokens an image, in every block", scale=alt.Scale(zero=False))
    curve = (
        alt.Chart(alt.Data(values=values))
        .mark_line(point={"filled": True, "size": 70}, color=look(FRONT).colour)
        .encode(x=x, y=alt.Y("ms:Q", title="milliseconds, all blocks"), tooltip=["tokens:Q", "milliseconds:N"])
    )
    rules = (
        alt.Chart(alt.Data(values=counts))
        .mark_rule(color=look(PLAN).colour, strokeDash=[4, 4], strokeWidth=1.5)
        .encode(x=x, tooltip=[alt.Tooltip("tokens:Q", title="tokens under the plan")])
    )
    return _finished(rules + curve)


def words_chart(numbers: Sequence[int], shares: Sequence[float], here: Sequence[float]) -> dict[str, Any]:
    """How often the most frequent words occur.

    Args:
        numbers: of the words.
        shares: of the patches that the codebook was built from.
        here: of the patches of the report's images.
    """
    values = [
        {"word": str(number), "images": images, "share": share, "of the patches": f"{100 * share:.2f} %"}
        for images, own in (("codebook's data set", shares), ("these images", here))
        for number, share in zip(numbers, own, strict=True)
    ]
    images = ["codebook's data set", "these images"]
    bars = (
        alt.Chart(alt.Data(values=values))
        .mark_bar()
        .encode(
            x=alt.X("word:N", sort=[str(number) for number in numbers], title="word"),
            xOffset=alt.XOffset("images:N", sort=images),
            y=alt.Y("share:Q", title="share of the patches", axis=alt.Axis(format="%")),
            color=alt.Color(
                "images:N",
                scale=alt.Scale(domain=images, range=[look(FRONT).colour, look("VWT paper").colour]),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
            tooltip=["word:N", "images:N", "of the patches:N"],
        )
    )
    return _finished(bars)


def _finished(chart: Any) -> dict[str, Any]:
    """The specification, as wide as its place; colours of text and lines are those of the page."""
    sized = chart.properties(width="container", height=HEIGHT, background="transparent")
    sized = sized.configure(font="system-ui, sans-serif").configure_view(stroke=None)
    sized = sized.configure_axis(labelFontSize=12, titleFontSize=13, titleFontWeight="normal", labelLimit=160)
    specification: dict[str, Any] = sized.configure_legend(labelFontSize=12, labelLimit=240).to_dict()
    return specification
