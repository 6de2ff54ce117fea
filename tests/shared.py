"""Path of the project's reference data: beside the checkout, or `D2I_SHARED`."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("D2I_SHARED", Path(__file__).resolve().parents[2] / "shared"))

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(),
    reason=f"the reference data folder {SHARED.name}/ is not beside the checkout",
)
