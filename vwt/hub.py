"""Codebooks and plans as repositories: on the Hugging Face hub, or in a folder that is laid out like one.

huggingface_hub uploads and downloads, so that its cache, its log-in, HF_ENDPOINT and HF_HUB_OFFLINE hold here too.
What is downloaded is zarr, JSON and pictures, of which nothing is executed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vwt.errors import HubError, brief, first_line

HUB, LOCAL = "hf-hub:", "local-dir:"  # the prefixes of timm


_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def has_prefix(source: object) -> bool:
    """Whether a source is named by `hf-hub:` or `local-dir:`."""
    return str(source).startswith((HUB, LOCAL))


def fetch(source: str, kind: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a repository, downloaded if it is on the hub.

    Args:
        source: `user/name`, `hf-hub:user/name`, either with `@revision` behind it, `local-dir:FOLDER`, or a folder.
        kind: of what is in it, "codebook" or "plan".
        patterns: of the files that are downloaded, beside `config.json`.
        revision: a branch, tag or commit; by default "main".

    Raises:
        HubError: if there is no such repository or revision, it is private, holds something else, or is out of reach
            and not in the cache.
    """
    name = source.removeprefix(LOCAL).removeprefix(HUB)
    repository, _, pinned = name.partition("@")
    if source.startswith(LOCAL) or (not source.startswith(HUB) and Path(name).is_dir()):
        folder = Path(name)
        if not folder.is_dir():
            raise HubError(f"no folder {name}; expected the copy of a repository with a {kind}")
    elif not _REPOSITORY.fullmatch(repository):
        raise HubError(f"no folder and no repository {name!r}; expected user/name, or {LOCAL}FOLDER")
    else:
        folder = _download(repository, revision or pinned or None, ["config.json", *patterns])
    _check_kind(folder, name, kind)
    return folder


def pin(source: str, folder: Path) -> str:
    """A source that names what is in `folder` and nothing later: with its commit, or the folder's full path."""
    if folder.parent.name != "snapshots":  # where the cache has commits
        return f"{LOCAL}{folder.resolve()}"
    return f"{HUB}{source.removeprefix(HUB).partition('@')[0]}@{folder.name}"


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    at = f"{repository}@{revision}" if revision else repository
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=patterns,
                library_name="vwt",
                library_version=version("vwt"),
            )
        )
    except Exception as error:  # huggingface_hub's, its HTTP library's, and the disk's
        raise _explain(error, at) from error


def _explain(error: Exception, at: str) -> HubError:
    """What went wrong, in one line that says what to do."""
    if isinstance(error, GatedRepoError):
        return HubError(f"{at} is gated: ask for access on its page, and log in with `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return HubError(f"the hub has no repository {at}, or it is private; check its name, or log in: `hf auth login`")
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"the hub has no revision {at}; expected a branch, tag or commit")
    if isinstance(error, HFValidationError):
        return HubError(f"{at!r} is no name of a repository; expected user/name")
    if isinstance(error, EntryNotFoundError):  # of the cache too
        return HubError(f"{at} is not in the cache, and the hub is out of reach; try again with a network")
    return HubError(f"cannot reach {at} on the hub: {first_line(error)}; try again")


def _check_kind(folder: Path, name: str, kind: str) -> None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise HubError(f"{name} holds no {kind} of vwt: it has no readable config.json") from error
    found = config.get("vwt") if isinstance(config, dict) else None
    if found != kind:
        what = f"a {found} of vwt" if found in ("codebook", "plan") else "something else"
        raise HubError(f"{name} holds {what}; expected a {kind} of vwt ({brief(found)} in its config.json)")


@dataclass(frozen=True)
class Card:
    """What the model card of a repository says.

    Attributes:
        about: a sentence.
        tags: beside "vwt" and the kind.
        facts: the rows of a table.
        usage: Python code.
        more: Markdown that follows.
    """

    about: str
    tags: Sequence[str]
    facts: Mapping[str, Any]
    usage: str
    more: str = ""


def push(folder: Path, repository: str, kind: str, card: Card, private: bool | None = None) -> str:
    """Upload a folder, with `config.json`, by which the hub counts downloads, and the card as `README.md`.

    Args:
        folder: what the repository will hold, beside these two, which are written into it.
        repository: `user/name`; made if there is none.
        kind: "codebook" or "plan".
        card: of the repository.
        private: whether a new repository is; by default as the account has it.

    Returns:
        The address of the commit.

    Raises:
        HubError: if the hub refuses, or is out of reach.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise HubError(f"{repository!r} is no name of a repository; expected user/name")
    config = {"vwt": kind, "library_name": "vwt", "version": version("vwt")}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "README.md").write_text(_write_card(repository, kind, card), encoding="utf-8")
    api = HfApi(library_name="vwt", library_version=version("vwt"))
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Upload {kind} with vwt",
            delete_patterns="codebook*",  # chunks that the new one has no more
        )
    except Exception as error:  # as above
        raise _explain(error, repository) from error
    return str(commit.commit_url)


def _write_card(repository: str, kind: str, card: Card) -> str:
    data = ModelCardData(library_name="vwt", tags=["vwt", f"vwt-{kind}", *card.tags])
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in card.facts.items())
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repository.partition('/')[2]}\n\n{card.about}\n\n"
        f"```python\nimport timm, vwt\n\n{card.usage}\n```\n\n| what | value |\n| --- | --- |\n{rows}\n{card.more}"
    )


def _cell(value: Any) -> str:
    """A value in a table of Markdown, in one line."""
    return " ".join(str(value).split()).replace("|", "\\|")
