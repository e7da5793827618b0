"""Every law of the GPU step's tail, on the CPU."""

import pytest

from tests.kernels.device_tail_checks import *  # noqa: F403

# The interpreter is numpy, which warns where a GPU gives inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
