"""Holds warmserve_rt/ to one direction: a module imports only what stands below it."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "warmserve_rt"

# From top to bottom; a folder is one unit. What is imported for types alone does not count: the
# native module's stub names what Python hands it.
ORDER = [
    "__main__",
    "cli",
    "demo",
    "sim",
    "engines",
    "testing",
    "simcuda",
    "sizes",
    "starts",
    "dispatch",
    "runtime_fleet",
    "runtime_device",
    "loop",
    "scheduler",
    "__init__",
    "runtime",
    "_at_exit",
    "options",
    "evicting",
    "inspecting",
    "_in_thread",
    "ticket",
    "paths",
    "devices",
    "revisions",
    "lease",
    "selection",
    "model",
    "registration",
    "streams",
    "snapshot",
    "views",
    "layers",
    "dtypes",
    "checkpoint",
    "kernels",
    "policy",
    "_terminal",
    "_text",
    "_awaiting",
    "_paths",
    "_units",
    "_arguments",
    "_log",
    "_native",
    "_errors",
]


class Imports(ast.NodeVisitor):
    """The modules of this package that a file imports when it runs, with their lines."""

    def __init__(self, package: list[str]) -> None:
        self.package = package  # of the file, from warmserve_rt on
        self.found: list[tuple[int, str]] = []

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.add(node.lineno, [alias.name for alias in node.names])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package[: len(self.package) + 1 - node.level] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        if module == "warmserve_rt":
            for alias in node.names:
                submodule = (PACKAGE / f"{alias.name}.py").exists() or alias.name == "_native"
                self.add(node.lineno, [f"{module}.{alias.name if submodule else '__init__'}"])
        else:
            self.add(node.lineno, [module])

    def add(self, line: int, modules: list[str]) -> None:
        for module in modules:
            if module.startswith("warmserve_rt."):
                self.found.append((line, module.split(".")[1]))


def problems() -> list[str]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        own = parts[0]
        if own not in ORDER:
            found.append(f"{path.name} has no place in the order")
            continue
        imports = Imports(["warmserve_rt", *parts[:-1]])
        imports.visit(ast.parse(path.read_text()))
        for line, unit in imports.found:
            if unit not in ORDER:
                found.append(f"{path}:{line}: {unit} has no place in the order")
            elif unit != own and ORDER.index(unit) <= ORDER.index(own):
                found.append(f"{path}:{line}: {own} imports {unit}, which stands above it")
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, warmserve_rt; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    ).stdout.split()
    heavy = {"torch", "cupy", "transformers", "safetensors", "rich", "typer", "numba"} & set(loaded)
    return found + [f"importing warmserve_rt imports {module}" for module in sorted(heavy)]


if __name__ == "__main__":
    sys.exit("\n".join(problems()) or None)
