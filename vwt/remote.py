"""Images in object storage: a folder, or a tar file, on any file system that fsspec knows, as one of timm's readers."""

import io
import os
from typing import Any

import fsspec
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

from vwt.errors import DataError, first_line

# What timm looks for in a folder that has sub-folders of splits.
_SPLITS = (("train", "training"), ("val", "valid", "eval", "validation"))


def is_url(source: str) -> bool:
    """Whether a source is named by a URL, such as `s3://bucket/folder`."""
    return "://" in source


def stays_here(source: str) -> bool:
    """Whether a URL is of the memory of this process, which no other process sees."""
    return "memory://" in source


class RemoteReader(Reader):
    """The images of a folder or tar file at a URL, in the order and with the names and labels of a local copy.

    The file system is opened anew in each process: connections outlive neither a fork nor a pickle.

    Args:
        url: `s3://bucket/folder`, `gs://bucket/images.tar`, ...; fsspec's packages find credentials and endpoints.
        split: taken from the sub-folder of that name, if there is one.
        class_map: file with the name of one class a line; images of other classes are left out.

    Attributes:
        samples: path below the folder, and label, of each image.
        class_to_idx: label of each class, which is the name of the images' own folder.

    Raises:
        DataError: if the file system cannot be opened or listed; when an image cannot be fetched, except that it is
            gone, which is the FileNotFoundError of a local one.
    """

    def __init__(self, url: str, split: str = "train", class_map: str = "") -> None:
        super().__init__()
        self.url = f"tar://::{url}" if url.endswith(".tar") else url
        self.part = ""
        self._opened: tuple[int, Any, str] | None = None
        names = self._list()
        tops = {name.partition("/")[0] for name in names if "/" in name}
        wanted = split.partition("[")[0]
        synonyms = next((each for each in _SPLITS if wanted in each), ())
        self.part = next((f"{name}/" for name in (wanted, *synonyms) if name in tops), "")
        names = [name.removeprefix(self.part) for name in names if name.startswith(self.part)]
        labels = [name.rpartition("/")[0].rpartition("/")[2] for name in names]
        classes = {name: label for label, name in enumerate(sorted(set(labels), key=natural_key))}
        self.class_to_idx: dict[str, int] = load_class_map(class_map) if class_map else classes
        known = [(n, self.class_to_idx[c]) for n, c in zip(names, labels, strict=True) if c in self.class_to_idx]
        self.samples = sorted(known, key=lambda sample: (natural_key(sample[0]), sample[0]))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        """The bytes of an image, and its label."""
        name, label = self.samples[index]
        files, root = self._open()
        try:
            return io.BytesIO(files.cat_file(f"{root}/{self.part}{name}")), label
        except FileNotFoundError:
            raise
        # Every file system raises errors of its own.
        except Exception as error:
            raise DataError(
                f"cannot fetch {name} of {self.url}: {first_line(error)}; see that the storage can be reached, and try "
                "again (a build: with --resume)"
            ) from error

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.samples[index][0]
        return os.path.basename(name) if basename else name

    def _open(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            files, root = fsspec.core.url_to_fs(self.url)
            self._opened = os.getpid(), files, root.rstrip("/")
        return self._opened[1:]

    def _list(self) -> list[str]:
        """Paths of all images below the folder."""
        types = get_img_extensions(as_set=True)
        try:
            files, root = self._open()
            files.invalidate_cache()
            found = files.find(root)
        except FileNotFoundError as error:
            raise DataError(f"there is no {self.url}: {first_line(error)}") from error
        except ImportError as error:
            raise DataError(f"cannot open {self.url}: {first_line(error)}") from error
        except Exception as error:
            raise DataError(
                f"cannot list {self.url}: {first_line(error)}; see that the address and the credentials are right"
            ) from error
        return [path[len(root) :].lstrip("/") for path in found if os.path.splitext(path)[1].lower() in types]
