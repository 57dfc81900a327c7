"""The offline builder: from the patches of a data set to a codebook of visual words."""

from vwt.codebook.codebook import Codebook

__all__ = ["Codebook"]
