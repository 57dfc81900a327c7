"""A plan as a repository: `plan.json`, the codebooks that it names, and its model card."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vwt import hub
from vwt.codebook.codebook import Codebook
from vwt.errors import DocumentError, brief

PATTERNS = ("plan.json", "profile.json", "codebook-*.zarr/*")


_CODEBOOK = re.compile(r"codebook-\d+\.zarr")


def pack_codebooks(strategies: list[dict[str, Any] | None], folder: Path) -> list[dict[str, Any] | None]:
    """Strategies as plans write them, with copies of their codebooks in `folder` by name; those of the hub stay there.

    Raises:
        CodebookError: if one cannot be read.
    """
    names: dict[str, str] = {}
    packed = []
    for made in strategies:
        source = None if made is None else made.get("codebook")
        if source is not None and not source.startswith(hub.HUB):
            if source not in names:
                names[source] = f"codebook-{len(names)}.zarr"
                Codebook.load(source).save(folder / names[source])
            made = {**made, "codebook": names[source]} if made is not None else None
        packed.append(made)
    return packed


def unpack_codebook(made: dict[str, Any] | None, folder: Path) -> dict[str, Any] | None:
    """A strategy of a repository, with the full path of its codebook.

    Raises:
        DocumentError: if that is neither in the repository nor on the hub.
    """
    source = None if made is None else made.get("codebook")
    if made is None or source is None or source.startswith(hub.HUB):
        return made
    if not _CODEBOOK.fullmatch(source):
        raise DocumentError(f"the plan names the codebook {brief(source)}, outside its repository; push it again")
    return {**made, "codebook": str(folder / source)}


def make_card(
    repository: str, model: str, machine: Mapping[str, Any], facts: Mapping[str, Any], front: str, pictures: list[str]
) -> hub.Card:
    """The card of a plan in a repository `user/name`.

    Args:
        repository: where it will be.
        model: that was tuned.
        machine: on which.
        facts: beside these, and before them.
        front: the points that were found, as text.
        pictures: names of files in the repository.
    """
    shown = "".join(f"\n![{name}]({name})\n" for name in pictures)
    return hub.Card(
        about=f"A plan of `vwt` for {model} on {machine['device']} ({machine['cpu']}): where tokens are reduced, "
        "with the latency and the agreement that were measured.",
        tags=("token-reduction", "latency"),
        facts={"model": model, **facts, **{f"machine: {name}": value for name, value in machine.items()}},
        usage=f'plan = vwt.Plan.from_pretrained("{repository}")\n'
        f'model = timm.create_model("{model}", pretrained=True).eval()\n'
        "fast = plan.apply(model)",
        more=f"\n```text\n{front}\n```\n{shown}",
    )
