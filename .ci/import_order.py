"""Checks that each module of warmserve_rt/ imports only packages and modules below it.

Also checks that only core/ and checkpoint/ use the native objects of their classes.
"""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "warmserve_rt"

# From top to bottom: packages and modules of warmserve_rt/ and, if their order matters, the modules
# of a package. The modules of a package that is not listed may import each other in any order.
# Imports for type checking count only in the packages of TYPED, which have no cycles of types.
ORDER = {
    "": [
        "__main__",
        "cli",
        "memory_command",
        "demo",
        "sim",
        "engines",
        "testing",
        "__init__",
        "scheduling",
        "core",
        "checkpoint",
        "kernels",
        "policy",
        "_terminal",
        "_text",
        "_cache_dir",
        "_units",
        "_arguments",
        "_log",
        "_native",
        "_errors",
    ],
    "sim": ["command", "report", "study", "controllers", "core", "workload", "__init__"],
    "sim.controllers": [
        "policies",
        "baselines",
        "autoscaling",
        "scheduled",
        "dispatcher",
        "__init__",
    ],
    "sim.core": [
        "fleet",
        "startup",
        "kv_cache",
        "memory",
        "eviction",
        "links",
        "prefetch",
        "interference",
        "devices",
        "instance",
        "requests",
        "host",
        "clock",
        "__init__",
    ],
    "engines": ["vllm", "transformers", "torch", "__init__"],
    "scheduling": [
        "fleet",
        "scheduled_runtimes",
        "fleet_models",
        "host",
        "device",
        "model_on_device",
        "registered_models",
        "loop",
        "scheduler",
        "host_plan",
        "copies",
        "protocols",
        "__init__",
    ],
    "core": [
        "broker",
        "broker_status",
        "keeper",
        "runtime",
        "_at_exit",
        "options",
        "broker_connection",
        "registering",
        "loading",
        "evicting",
        "inspecting",
        "_in_thread",
        "ticket",
        "routes",
        "devices",
        "revisions",
        "lease",
        "_acquisitions",
        "lease_streams",
        "framework_streams",
        "model",
        "selection",
        "registration",
        "streams",
        "snapshot",
        "views",
        "torch_sharing",
        "_awaiting",
        "__init__",
    ],
    "checkpoint": [
        "sizes",
        "layout",
        "dtypes",
        "__init__",
        "directory",
        "files",
        "header",
        "choice",
        "hub",
        "mistaken",
    ],
}
TYPED = {"sim.core"}


# The packages whose classes wrap native objects, in their attribute ``native``.
WRAP_NATIVE = ("core", "checkpoint")


class Imports(ast.NodeVisitor):
    """The modules of this package that a file imports, with their lines.

    Imports for type checking are left out, unless the file's package is one of TYPED.
    """

    def __init__(self, package: list[str]) -> None:
        self.package = package  # the file's package, beginning with warmserve_rt
        self.found: list[tuple[int, list[str]]] = []

    def visit_If(self, node: ast.If) -> None:
        checked = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        checked = checked and ".".join(self.package[1:]) not in TYPED
        for each in node.orelse if checked else [*node.body, *node.orelse]:
            self.visit(each)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(node.lineno, alias.name.split("."))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package[: len(self.package) + 1 - node.level] if node.level else []
        module = [*base, *(node.module.split(".") if node.module else [])]
        for alias in node.names:
            self.add(node.lineno, [*module, alias.name])

    def add(self, line: int, name: list[str]) -> None:
        """Add the module that ``name`` is or belongs to."""
        if name[0] != PACKAGE.name:
            return
        if not is_module(name[1:]):
            name = name[:-1]
        found = name[1:]
        if (PACKAGE.joinpath(*found)).is_dir():
            found.append("__init__")
        self.found.append((line, found))


def is_module(name: list[str]) -> bool:
    path = PACKAGE.joinpath(*name)
    return path.is_dir() or any(path.with_name(path.name + end).exists() for end in (".py", ".pyi"))


def complaint(own: list[str], imported: list[str]) -> str | None:
    """Return the problem with an import of one module by another, or None."""
    if own == imported:
        return None
    depth = next(n for n, name in enumerate(own) if name != imported[n])
    order = ORDER.get(".".join(own[:depth]))
    if order is None:
        return None
    above, below = own[depth], imported[depth]
    for each in (above, below):
        if each not in order:
            return f"{'.'.join([*own[:depth], each])} is missing from ORDER"
    if order.index(below) < order.index(above):
        return f"{'.'.join(own)} imports {'.'.join(imported)}, which is above it in ORDER"
    return None


def problems() -> list[str]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = list(path.relative_to(PACKAGE).with_suffix("").parts)
        for depth in range(len(own)):
            order = ORDER.get(".".join(own[:depth]))
            if order is not None and own[depth] not in order:
                found.append(f"{'.'.join(own[: depth + 1])} is missing from ORDER")
        imports = Imports([PACKAGE.name, *own[:-1]])
        tree = ast.parse(path.read_text())
        imports.visit(tree)
        if own[0] not in WRAP_NATIVE:
            found += [
                f"{path}:{node.lineno}: .native may be used in {' and '.join(WRAP_NATIVE)} only"
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and node.attr == "native"
            ]
        for line, imported in imports.found:
            if said := complaint(own, imported):
                found.append(f"{path}:{line}: {said}")
    if found:  # the package may be impossible to import
        return found
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
