"""Stored files, damaged at random: each must be refused by one of our errors, or loaded as it is written.

    make fuzz [MUTATIONS=10000] [SEED=...]

A mutation is a function of the seed and its number, so that `--first NUMBER --mutations 1` repeats one. Of a codebook,
the words that are loaded must be those that were saved; documents have no checksums, so that what is loaded, saved
again, must be what the file says. What is loaded is used, too. A call may take SECONDS, and MEMORY bytes.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from energy_record import Record
from tqdm import tqdm

from tests.codebook.test_codebook import codebook, spec
from tests.tuning.test_plan import make_plan
from tests.tuning.test_profile import make_profile
from vwt import Absorb, Codebook, LatencyProfile, Merge, Plan, PruningSchedule
from vwt.documents import write_json
from vwt.energy.meter import DeviceEnergy, Energy
from vwt.errors import DocumentError, VWTError
from vwt.tuning.notes import read_notes
from vwt.tuning.plan import make_strategy

SECONDS = 5.0
MEMORY = 256 << 20


class Overtime(BaseException):
    """A call took too long; no Exception, so that nothing takes it for a damaged file."""


@dataclass(frozen=True)
class Kind:
    """A kind of stored file.

    Attributes:
        name: of the file or folder.
        write: makes a sound one.
        read: loads and uses it; asserts that it is what was written, or what the file says.
    """

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], None]


# -- what is stored, and how it is read and used -----------------------------------------------------------------------


def read_codebook(path: Path) -> None:
    loaded, space = Codebook.load(path), "pixel" if "pixel" in path.name else "embedding"
    saved = codebook(space)
    if space == "pixel":
        saved = saved.normalised((0.0,) * 3, (1.0,) * 3)
    for name in ("words", "counts", "document_counts"):
        assert torch.equal(getattr(loaded, name), getattr(saved, name)), f"other {name}"
    text = zipfile.ZipFile(path).read("zarr.json") if path.is_file() else (path / "zarr.json").read_bytes()
    attributes = json.loads(text)["attributes"]
    for name in ("space", "patch_size", "mean", "std", "projection", "provenance"):
        value = getattr(loaded, name)
        same(list(value) if isinstance(value, tuple) else value, attributes[name])
    repr(loaded)
    loaded.for_model(spec())


def read_profile(path: Path) -> None:
    profile = LatencyProfile.load(path)
    says_the_same(profile, path)
    profile.predict({1: Absorb(3), 2: Merge(0.5)}), profile.knees(), profile.error
    PruningSchedule({1: 3}).table(profile)


def read_schedule(path: Path) -> None:
    schedule = PruningSchedule.load(path)
    rows = json.loads(path.read_text())["reductions"]
    same(schedule.to_json(), sorted(rows, key=lambda row: row["block"]))
    hash(schedule), repr(schedule), schedule.table(make_profile()), schedule.check(4, 16)


def read_plan(path: Path) -> None:
    plan = Plan.load(path)
    says_the_same(plan, path)
    str(plan), make_strategy(plan.chosen.strategy)


def write_notes(path: Path) -> None:
    write_json(path, {"of": "abc", "profile": asdict(make_profile()), "measured": {"Neighbours(0.2)": 0.25, "": 0.5}})


def read_kept(path: Path) -> None:
    kept = read_notes(path)
    if kept is None:  # damaged: measured again
        raise DocumentError("no notes")
    same({"of": kept[0], "profile": asdict(kept[2]), "measured": kept[1]}, json.loads(path.read_text()))


HEADER = {"hardware": "Abacus", "sensors": [], "arguments": {"batch_size": 2, "model": "vit"}}


def write_results(path: Path) -> None:
    record = Record([path, path.with_suffix(".csv")], HEADER)
    record.facts = [{"name": "full", "group": "full", "note": None, "tokens": 17.0, "agreement": 1.0}]
    energy = Energy(
        2.0, 8, (DeviceEnergy("cpu", "rapl", 2.0, 8, 3.5), DeviceEnergy("ram", "rapl", 2.0, 8, None, "lost")), 0.01
    )
    record.add(record.windows, "full", 1, energy)
    record.add(record.idle, "idle", 1, replace(energy, images=0))


def read_results(path: Path) -> None:
    record = Record.open([path, path.with_suffix(".csv")], HEADER, fresh=False)
    tables = json.loads(path.read_text())["tables"]
    same([record.facts, record.windows, record.idle], [tables[name] for name in ("facts", "windows", "idle")])
    record.rows(), record.device_rows(), record.session


def says_the_same(document: Any, path: Path) -> None:
    """What was loaded, saved again, has the content of the file."""
    document.save(path.with_name("again.json"))
    same(json.loads(path.with_name("again.json").read_text()), json.loads(path.read_text()))


def same(one: Any, other: Any) -> None:
    # As text: NaN is unlike itself, and True like 1.
    texts = [json.dumps(value, sort_keys=True) for value in (one, other)]
    assert texts[0] == texts[1], f"loaded {texts[0]:.200}, stored {texts[1]:.200}"


KINDS = [
    Kind("pixel.zarr", lambda path: codebook("pixel").save(path), read_codebook),
    Kind("embedding.zarr", lambda path: codebook().save(path), read_codebook),
    Kind("pixel.zarr.zip", lambda path: codebook("pixel").save(path), read_codebook),
    Kind("embedding.zarr.zip", lambda path: codebook().save(path), read_codebook),
    Kind("plan.json", lambda path: make_plan().save(path), read_plan),
    Kind("schedule.json", lambda path: PruningSchedule({3: 0.25, 2: Merge(4)}).save(path), read_schedule),
    Kind("profile.json", lambda path: make_profile().save(path), read_profile),
    Kind("plan.json.tuning", write_notes, read_kept),
    Kind("results.json", write_results, read_results),
]


# -- mutations ---------------------------------------------------------------------------------------------------------

VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 10**12, -(10**12), 2**63, 10**400, 0.0, -0.0, 0.5, 1e308, float("nan"),
    float("inf"), -float("inf"), "", "nan", "0", "../../evil", "{0}", "%s", "\x00", "ä\n", [], {}, [0], [[]],
    {"": None}, [10**12], [10**12, 10**12], ["a"], {"a": "b"}, "little", "big", "float64", "int64", "zstd",
]  # fmt: skip


def mutate(files: dict[str, bytes], chance: random.Random) -> tuple[dict[str, bytes], str]:
    """Files by name, one of them damaged, and in words how."""
    name = chance.choice(sorted(files))
    content, how = files[name], ""
    if len(files) > 1 and chance.random() < 0.05:
        other = chance.choice([None, *sorted(files)])
        kept = {key: value for key, value in files.items() if key != name}
        return (kept if other is None else files | {name: files[other]}), f"{name} is {other}"
    if name.endswith(".zip"):
        content, how = mutate_zip(content, chance)
    elif (name.endswith(".json") or name.endswith(".tuning")) and chance.random() < 0.7:
        value = json.loads(content)
        how = mutate_value(value, chance)
        content = json.dumps(value).encode()
    if not how:
        content, how = mutate_bytes(content, chance)
    return files | {name: content}, f"{name}: {how}"


def mutate_zip(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A part of a zip file damaged, and packed again, perhaps compressed; or nothing, for its bytes to be damaged."""
    if chance.random() < 0.4:
        return content, ""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        with zipfile.ZipFile(file) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        parts, how = mutate(parts, chance)
        if chance.random() < 0.1:
            parts["../../evil"] = b"evil"
        file.seek(0)
        file.truncate()
        with zipfile.ZipFile(file, "w", chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name, part in parts.items():
                archive.writestr(name, part)
        file.seek(0)
        return file.read(), f"within, {how}"


def mutate_value(value: Any, chance: random.Random) -> str:
    """Change a value of JSON somewhere, in place; says how."""
    path, place, key = [], value, None
    while isinstance(place, dict | list) and place:
        parent, key = place, chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        path.append(str(key))
        place = parent[key]
        if chance.random() < 0.2:
            break
    way, old = chance.choice(["value", "value", "scale", "delete", "add", "deep"]), place
    if way == "scale" and isinstance(old, int | float):
        parent[key] = old * chance.choice([-1, 2, 1000, 10**9, 0.5])
    elif way == "delete":
        del parent[key]
        return f"without {'.'.join(path)}"
    elif way == "add":
        if isinstance(parent, dict):
            parent[chance.choice(["other", "", "name", "codebook", "__class__"])] = chance.choice(VALUES)
        else:
            parent.insert(chance.randrange(len(parent) + 1), chance.choice([old, chance.choice(VALUES)]))
        return f"one more beside {'.'.join(path)}"
    elif way == "deep":
        parent[key] = [[[[old]]]] if chance.random() < 0.9 else nest(500)
    else:
        parent[key] = chance.choice(VALUES)
    return f"{'.'.join(path)} is {parent[key]!r:.80} in the place of {old!r:.40}"


def nest(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


def mutate_bytes(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Bytes flipped, overwritten, cut, copied or put in."""
    data = bytearray(content)
    way = chance.choice(["bit", "bits", "byte", "cut", "remove", "copy", "insert", "zeros", "digit"])
    first = chance.randrange(len(data) + 1)
    last = min(len(data), first + chance.choice([1, 2, 4, 8, 64, 512]))
    if way in ("bit", "bits", "byte") and data:
        for _ in range(1 if way != "bits" else chance.randrange(2, 20)):
            at = chance.randrange(len(data))
            data[at] = chance.randrange(256) if way == "byte" else data[at] ^ (1 << chance.randrange(8))
    elif way == "cut":
        del data[first:]
    elif way == "remove":
        del data[first:last]
    elif way == "copy":
        at = chance.randrange(len(data) + 1)
        data[at:at] = data[first:last]
    elif way == "insert":
        data[first:first] = chance.choice([b"\x00", b"\xff" * 8, b"1" * 30, b'"', b"{", b"]", b"[" * 5000, b"9" * 5000])
    elif way == "zeros":
        data[first:last] = bytes(last - first)
    else:
        places = [at for at, byte in enumerate(data) if chr(byte).isdigit()]
        if places:
            at = chance.choice(places)
            data[at : at + 1] = chance.choice([b"0", b"9", b"-1", b"1e999", b"999999999999"])
    return bytes(data), f"{way} at {first}"


# -- a run -------------------------------------------------------------------------------------------------------------


@contextmanager
def bounded() -> Iterator[None]:
    """Within, SECONDS and MEMORY more bytes of addresses are all that there is."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    handler = signal.signal(signal.SIGALRM, _raise_overtime)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _raise_overtime(*_: Any) -> None:
    raise Overtime(f"more than {SECONDS} seconds")


def try_file(kind: Kind, path: Path) -> tuple[str, str]:
    """ "refused", "equal" or "WRONG", and in words what happened."""
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.read(path)
    except VWTError as error:
        causes = [error, error.__cause__, error.__context__]
        if any(isinstance(cause, MemoryError) for cause in causes) or "allocate" in str(error):
            return "WRONG", f"refused only as memory ended: {error}"
        if "\n" in str(error) or len(str(error)) > 1500:
            return "WRONG", f"a message of {len(str(error))} characters, or of several lines: {str(error)[:200]!r}"
        return "refused", str(error)
    except (Exception, Overtime) as error:
        *_, frame = traceback.extract_tb(error.__traceback__)
        return "WRONG", f"{type(error).__name__}: {str(error)[:300]} ({Path(frame.filename).name}:{frame.lineno})"
    return "equal", ""


def fuzz(mutations: int, seed: int, first: int = 0, *, progress: bool = False) -> tuple[Counter[str], list[str]]:
    """How many files were refused, loaded as they are, or taken wrongly; and a line for each of the last."""
    found, wrong = Counter[str](), []
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "sound"
        sound.mkdir()
        for kind in KINDS:
            kind.write(sound / kind.name)
            kind.read(sound / kind.name)
        originals = {kind.name: _read_files(sound / kind.name) for kind in KINDS}
        for number in tqdm(range(first, first + mutations), unit="file", disable=not progress):
            chance = random.Random(f"{seed} {number}")
            kind = KINDS[number % len(KINDS)]
            files, how = mutate(originals[kind.name], chance)
            place = Path(folder) / "damaged" / "within"
            shutil.rmtree(place.parent, ignore_errors=True)
            place.mkdir(parents=True)
            _write_files(place, files)
            begun = time.perf_counter()
            verdict, what = try_file(kind, place / kind.name)
            if list(place.parent.parent.rglob("evil*")):
                verdict, what = "WRONG", "a path of a zip file left it"
            found[f"{kind.name} {verdict}"] += 1
            if verdict == "WRONG":
                wrong.append(f"{number}: {how}\n    {what} [{time.perf_counter() - begun:.1f} s]")
    return found, wrong


def _read_files(path: Path) -> dict[str, bytes]:
    paths = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path.parent).as_posix(): file.read_bytes() for file in paths}


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    found, wrong = fuzz(arguments.mutations, arguments.seed, arguments.first, progress=sys.stderr.isatty())
    for name, count in sorted(found.items()):
        print(f"{count:6}  {name}")
    print(*wrong, sep="\n")
    print(f"{len(wrong)} of {arguments.mutations} taken wrongly")
    return int(bool(wrong))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
