"""Build a codebook of visual words: `vwt build` as a script."""

import sys

from vwt.cli import main

if __name__ == "__main__":
    sys.exit(main(["build", *sys.argv[1:]]))
