"""What the energy benchmark keeps, windows as they end, and the tables that are made of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from results import Row, mean_interval, print_table, save_results

from vwt.documents import is_number
from vwt.energy.meter import Energy
from vwt.errors import ArgumentError, brief

COLUMNS = {
    "name": "", "joules_per_image": ".4g", "joules_ci": ".2g", "above_idle": ".4g", "watts": ".2f", "watts_ci": ".2g",
    "ms": ".2f", "ms_ci": ".2g", "images_per_second": ".1f", "tokens": ".1f", "agreement": ".3f", "windows": "d",
    "source": "", "note": "",
}  # fmt: skip
# What the rows of a file must have, for the tables that are made of them.
NUMBER, TEXT = int | float, str | None
WINDOW = {
    "name": str, "session": int, "device": str, "source": str, "seconds": NUMBER, "images": int,
    "joules": NUMBER | None, "watts": NUMBER | None, "cost": NUMBER | None, "reason": TEXT,
}  # fmt: skip
FACTS = {"name": str, "group": str, "tokens": NUMBER | None, "agreement": NUMBER | None, "note": TEXT}


@dataclass
class Record:
    """What has been measured.

    Attributes:
        paths: of the results, JSON and CSV; empty if nothing is written.
        header: see `make_header`.
        facts: name, tokens, agreement and note of variants.
        windows: rows of `add`.
        idle: rows of `add`, without images.
    """

    paths: list[Path]
    header: Row
    facts: list[Row] = field(default_factory=list)
    windows: list[Row] = field(default_factory=list)
    idle: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, paths: list[Path], header: Row, *, fresh: bool) -> "Record":
        """What the results file has, or nothing.

        Raises:
            ArgumentError: if the file was not written by this benchmark, or with another header.
        """
        record = cls(paths, header)
        if fresh or not paths or not paths[0].exists():
            return record
        way_out = "; measure anew with --fresh, or choose another --results-file"
        try:
            saved = json.loads(paths[0].read_text())
            then = {name: saved[name] for name in header}
            tables = saved["tables"]
            record.facts, record.windows, record.idle = tables["facts"], tables["windows"], tables["idle"]
            _check_rows(record.facts, FACTS)
            _check_rows([*record.windows, *record.idle], WINDOW)
            if not all(row["seconds"] > 0 and row["images"] > 0 for row in record.windows):
                raise ValueError("a window without time or images")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArgumentError(f"{paths[0]} holds no energy figures of this benchmark{way_out}") from error
        if then != header:
            raise ArgumentError(f"{paths[0]} has figures of {difference(then, header)}{way_out}")
        return record

    @property
    def session(self) -> int:
        """The number of the next run of the command."""
        return 1 + max((row["session"] for row in self.windows + self.idle), default=0)

    def done(self, name: str) -> int:
        """Windows that a variant has."""
        return sum(row["name"] == name and row["device"] == "total" for row in self.windows)

    def set_facts(self, facts: Row) -> None:
        """Keep what is known of a variant beside its windows."""
        self.facts = [row for row in self.facts if row["name"] != facts["name"]] + [facts]

    def sort(self, names: Sequence[str]) -> None:
        """Bring variants into an order."""
        self.facts.sort(key=lambda row: names.index(row["name"]) if row["name"] in names else len(names))

    def add(self, table: list[Row], name: str, session: int, energy: Energy) -> None:
        """A row for each device, and their total first, and write everything."""
        for device in (energy.total, *energy.devices):
            cost = energy.cost if device.device == "total" else None
            table.append({"name": name, "session": session, **asdict(device), "watts": device.watts, "cost": cost})
        self.save()

    def save(self) -> None:
        """Write all."""
        tables = {"energy": self.rows(), "devices": self.device_rows(), "idle": self.idle, "windows": self.windows}
        save_results(self.paths, self.header, {**tables, "facts": self.facts})

    def rows(self) -> list[Row]:
        """The table: a row for each variant."""
        found = []
        for facts in self.facts:
            row = {"name": facts["name"], "group": facts["group"], "source": "none", **self.summary(facts["name"])}
            lost = row.pop("note", None) if self.header["sensors"] else None  # without any, one line says it for all
            notes = [note for note in (facts["note"], lost) if note]
            row |= {"tokens": facts["tokens"], "agreement": facts["agreement"], "note": "; ".join(notes) or None}
            found.append({**row, "hardware": self.header["hardware"]})
        return found

    def device_rows(self) -> list[Row]:
        """The same for each device."""
        pairs = dict.fromkeys((row["name"], row["device"]) for row in self.windows if row["device"] != "total")
        return [{"name": name, "device": device, **self.summary(name, device)} for name, device in pairs]

    def summary(self, name: str, device: str = "total") -> Row:
        """Means and intervals of a variant and a device; empty before its first window."""
        windows = [row for row in self.windows if (row["name"], row["device"]) == (name, device)]
        if not windows:
            return {}
        return summarise(windows, self.idle_watts(device), self.header["arguments"]["batch_size"])

    def by_device(self) -> tuple[list[Row], list[str]]:
        """Joules an image, a row for each variant and a column for each device that gave any; and those devices."""
        known = [row for row in self.device_rows() if row["joules_per_image"] is not None]
        rows = [
            {"name": name, **{row["device"]: row["joules_per_image"] for row in known if row["name"] == name}}
            for name in (facts["name"] for facts in self.facts)
        ]
        return rows, list(dict.fromkeys(row["device"] for row in known))

    def idle_watts(self, device: str) -> dict[int, float]:
        """Watts of a device at rest in each session, the mean of before and after."""
        watts: dict[int, list[float]] = {}
        for row in self.idle:
            if row["device"] == device and row["watts"] is not None:
                watts.setdefault(row["session"], []).append(row["watts"])
        return {session: float(np.mean(values)) for session, values in watts.items()}


def _check_rows(rows: list[Row], kinds: dict[str, Any]) -> None:
    """Raise TypeError, KeyError or ValueError unless all rows have values of these kinds, and finite numbers."""
    for row in rows:
        for name, kind in kinds.items():
            value = row[name]
            if not isinstance(value, kind) or (isinstance(value, int | float) and not is_number(value)):
                raise TypeError(f"{name} is {brief(value)}")
        if "joules" in kinds and (row["joules"] is None) != (row["watts"] is None):
            raise ValueError("joules without watts")


def difference(then: Row, now: Row) -> str:
    """The first thing in which two headers differ, in words."""
    for name, value in now.items():
        if isinstance(value, dict) and isinstance(then[name], dict) and value != then[name]:
            key = next(key for key in sorted({*value, *then[name]}) if value.get(key, ...) != then[name].get(key, ...))
            return f"another --{key.replace('_', '-')}: {brief(then[name].get(key))}, and not {brief(value.get(key))}"
        if value != then[name]:
            return f"another {name}: {brief(then[name])}, and not {brief(value)}"
    raise ValueError("the headers are equal")


def summarise(windows: Sequence[Row], idle_watts: dict[int, float], batch: int) -> Row:
    """Means and confidence intervals over the windows of one variant and one device (or the total).

    Windows without joules count for time only, and are named in the note.

    Args:
        windows: with seconds, images, joules, watts, source, reason and session.
        idle_watts: by session.
        batch: images in a batch.
    """
    row: Row = dict.fromkeys(("joules_per_image", "joules_ci", "above_idle", "watts", "watts_ci"))
    known = [window for window in windows if window["joules"] is not None]
    if known:
        row["joules_per_image"], row["joules_ci"] = mean_interval([w["joules"] / w["images"] for w in known])
        row["watts"], row["watts_ci"] = mean_interval([w["watts"] for w in known])
        if all(w["session"] in idle_watts for w in known):
            above = [(w["joules"] - idle_watts[w["session"]] * w["seconds"]) / w["images"] for w in known]
            row["above_idle"] = float(np.mean(above))
    row["ms"], row["ms_ci"] = mean_interval([1e3 * batch * w["seconds"] / w["images"] for w in windows])
    row["images_per_second"] = 1e3 * batch / row["ms"]
    sources = sorted({w["source"] for w in known})
    row |= {"windows": len(windows), "source": "+".join(sources) or "none", "note": None}
    lost = [w["reason"] for w in windows if w["joules"] is None]
    if lost:
        row["note"] = f"no joules in {len(lost)} of {len(windows)} windows: {lost[-1]}"
    return row


def report(record: Record) -> None:
    """Print what there is."""
    if not record.windows:
        return
    rows = record.rows()
    estimated = any(row.get("source") == "estimated" for row in rows)
    print_table("Energy" + (", joules and watts ESTIMATED" if estimated else ""), rows, COLUMNS)
    shares, devices = record.by_device()
    if len(devices) > 1:
        print_table("Joules an image by device", shares, {"name": "", **dict.fromkeys(devices, ".4g")})
    idle = [row["watts"] for row in record.idle if row["device"] == "total" and row["watts"] is not None]
    if idle:
        print(f"\nIdle, before and after: {', '.join(f'{watts:.2f}' for watts in idle)} W")
    totals = [row for row in record.windows if row["device"] == "total"]
    share = sum(row["cost"] for row in totals) / sum(row["seconds"] for row in totals)
    print(f"\nThe meter itself took {100 * share:.4f} % of the windows' time.")
