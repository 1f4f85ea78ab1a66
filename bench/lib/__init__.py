"""Code shared by several benches.

Importing this package makes the test helpers in tests/support importable.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path.insert(0, str(TESTS / "support"))
