"""Independent implementations that tests compare with: a missing one skips by hand and fails in continuous integration."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import pytest


def oracle(module: str) -> Any:
    """The imported module; without it the test is skipped with the reason, or fails when CI=true."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module)
        except ImportError as error:
            reason = f"{module.split('.')[0]} cannot be imported ({error}); make test installs it"
            pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
