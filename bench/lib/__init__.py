"""What several benches share.

Some of it uses helpers of the tests: after importing this package they can be imported.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path.insert(0, str(TESTS / "support"))
