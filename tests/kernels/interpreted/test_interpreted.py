"""Every law of the Triton tail, on the CPU."""

import pytest

from tests.kernels.triton_checks import *  # noqa: F403

# The interpreter is numpy, which warns where a GPU gives inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
