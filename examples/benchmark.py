"""Measures guarded decoding beside the plain decoder: one table, with its gates.

    python examples/benchmark.py --json benchmark.json --picture benchmark.png

The same as `langchain-stars benchmark`. `--only C1,C3` measures some rows, `--quick` less of all.
"""

import sys

from langchain_stars.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
