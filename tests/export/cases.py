"""What tests of traced models share."""

import pytest

from vwt.export.runtimes import can_trace

needs_tracing = pytest.mark.skipif(not can_trace(), reason="torch before 2.10 cannot trace reduced models")
