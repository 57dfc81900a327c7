"""`vwt env` and `vwt models`."""

import argparse
import sys
from pathlib import Path

from vwt.energy.meter import environment_report
from vwt.energy.sensors import POWERCAP
from vwt.errors import ModelError
from vwt.models.support import find_support, list_families


def add_env(env: argparse.ArgumentParser) -> None:
    """The options of `vwt env`."""
    env.add_argument("--powercap", type=Path, default=POWERCAP, metavar="DIR", help="folder of RAPL's counters")
    env.set_defaults(run=_env, if_interrupted="")


def _env(arguments: argparse.Namespace) -> int:
    print(environment_report(arguments.powercap))
    return 0


def add_models(models: argparse.ArgumentParser) -> None:
    """The options of `vwt models`."""
    models.add_argument("names", nargs="*", metavar="NAME", help="of a timm model, or a class of transformers")
    models.set_defaults(run=_models, if_interrupted="")


def _models(arguments: argparse.Namespace) -> int:
    if not arguments.names:
        print(list_families())
    status = 0
    for name in arguments.names:
        try:
            support = find_support(name)
        except ModelError as error:  # the others are answered all the same
            print(f"vwt: {error}", file=sys.stderr)
            status = 2
        else:
            print(support)
            status = max(status, int(support.reason is not None))
    return status
