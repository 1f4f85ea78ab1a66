"""Run the command line: ``python -m warmserve_rt``."""

from .cli import main

if __name__ == "__main__":
    main()
