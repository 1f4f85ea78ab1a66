"""Runs the mutants that a change may affect, and a part of the others that rotates by commit."""

from __future__ import annotations

import sys

from changed import ROOT, any_changed, changed_files, chosen

sys.path.insert(0, str(ROOT / "tests"))
import mutations


def support_changed() -> bool:
    """Return whether a helper or a fixture that many tests share has changed."""
    files = changed_files() or ()
    return any(f.startswith("tests/") and f.endswith(".py") and "/test_" not in f for f in files)


def main() -> int:
    everything = support_changed()

    def touched(mutation: mutations.Mutation) -> bool:
        test = mutation.test.partition("::")[0]
        return everything or any_changed(mutation.file, f"tests/{test}")

    names = [mutation.name for mutation in chosen(mutations.MUTATIONS, touched)]
    print(f"{len(names)} of {len(mutations.MUTATIONS)} mutants chosen", flush=True)
    return mutations.main(names)


if __name__ == "__main__":
    sys.exit(main())
