"""pytest -p tests.shuffled: modules and the tests in them in another order, and all that is random with another seed.

VWT_TEST_SEED names the seed; every process of a run must have the same.
"""

import os
import random

import numpy as np
import pytest
import torch

SEED = int(os.environ.get("VWT_TEST_SEED", "0"))


def pytest_report_header() -> str:
    return f"shuffled with VWT_TEST_SEED={SEED}"


# After what deselects tests, so that a run of a part has the order that it has in the whole.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules stay together, as their fixtures are made once."""

    def place(item: pytest.Item) -> tuple[float, str, float]:
        module = item.nodeid.split("::")[0]
        return random.Random(f"{SEED} {module}").random(), module, random.Random(f"{SEED} {item.nodeid}").random()

    items.sort(key=place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    random.seed(f"{SEED} {item.nodeid}")
    np.random.seed(random.getrandbits(32))
    torch.manual_seed(random.getrandbits(32))
