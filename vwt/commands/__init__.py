"""The commands of `vwt`: their options, and what they do with the library; imported when one is called."""

import argparse
from collections.abc import Callable

from vwt.commands.building import add_build
from vwt.commands.exporting import add_export
from vwt.commands.models import add_env, add_models
from vwt.commands.pictures import add_report, add_show
from vwt.commands.tuning import add_profile, add_schedule, add_tune

OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "build": add_build,
    "profile": add_profile,
    "schedule": add_schedule,
    "tune": add_tune,
    "report": add_report,
    "export": add_export,
    "show": add_show,
    "env": add_env,
    "models": add_models,
}
