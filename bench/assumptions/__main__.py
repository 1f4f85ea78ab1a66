"""One process of rows: ``python -m assumptions OUT NAME...``"""

import sys
from pathlib import Path

from assumptions.run import worker

worker(sys.argv[2:], Path(sys.argv[1]))
