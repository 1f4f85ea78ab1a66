"""Runs the mutants that a change may affect, and a part of the others that rotates by commit.

A mutant may be affected if its file or its test changed. A change of a helper or a fixture that
many tests share counts for none: the part that rotates has mutants of many files, which shows
whether tests still notice what they did. A run has time for MOST mutants. If a change may affect
more, these rotate by commit, too; `.ci/deep` runs all.
"""

from __future__ import annotations

import sys

from changed import ROOT, any_changed, chosen

sys.path.insert(0, str(ROOT / "tests"))
import mutations

MOST = 30


def touched(mutation: mutations.Mutation) -> bool:
    test = mutation.test.partition("::")[0]
    return any_changed(mutation.file, f"tests/{test}")


def main() -> int:
    names = [mutation.name for mutation in chosen(mutations.MUTATIONS, touched, MOST)]
    print(f"{len(names)} of {len(mutations.MUTATIONS)} mutants chosen", flush=True)
    return mutations.main(names, check_first=False)  # `.ci/run` runs the whole suite anyway


if __name__ == "__main__":
    sys.exit(main())
