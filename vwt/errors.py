"""The exceptions that a user can catch.

Each message says what was got, what was expected and what to do about it.
"""

import errno


class VWTError(Exception):
    """Base of everything that vwt raises on purpose."""


class ArgumentError(VWTError, ValueError):
    """An argument is out of its range or does not fit the others."""


class ImageError(VWTError, ValueError):
    """Images of a shape, size or dtype that the model does not take."""


class DataError(VWTError):
    """A data set cannot be read, or holds too little."""


class CodebookError(VWTError):
    """A codebook is missing, damaged, unfinished or written by a newer version."""


class DocumentError(VWTError):
    """A schedule, profile or plan cannot be read or written: missing, cut short, of another version."""


class MismatchError(VWTError):
    """A codebook, profile or plan was made for another model, or another way of running it."""


class ModelError(VWTError):
    """A model is unknown, unsupported or without the weights that are needed."""


class HubError(VWTError):
    """A repository is missing, private, out of reach, or holds something else."""


class ExportError(VWTError):
    """A model cannot be exported, or answers otherwise where it was exported to."""


def brief(value: object, most: int = 100) -> str:
    """The repr of a value that comes from a file, cut where it is long: it is damaged, and may be of any size."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def resume_advice(error: BaseException) -> str:
    """How a build goes on whose files could not be written."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room and go on with --resume"
    return "see that this place can be written and go on with --resume, or choose another"


def first_line(error: BaseException) -> str:
    """What another library's error says in one line that is not long; or its type where it says nothing.

    It is the first line, and the next wherever one ends with a colon.
    """
    lines = [line for each in str(error).splitlines() if (line := each.strip())]
    last = next((number for number, line in enumerate(lines) if not line.endswith(":")), len(lines))
    return " ".join(lines[: last + 1])[:300] or type(error).__name__
