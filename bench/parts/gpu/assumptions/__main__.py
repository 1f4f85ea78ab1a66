"""Run rows in one process: ``python -m parts.gpu.assumptions OUT NAME...``"""

import sys
from pathlib import Path

from parts.gpu.assumptions.run import worker

worker(sys.argv[2:], Path(sys.argv[1]))
