"""Whether the tests would notice: breaks one line at a time and runs the test that must fail.

    python tests/mutations.py [NAME ...]

Works on a copy of the source tree; exit status 1 if a mutant survives or no longer applies.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    line: str
    instead: str
    test: str


MUTATIONS = [
    Mutation(
        "a fence is not waited for",
        "csrc/backing.cpp",
        "for (const auto& fence : fences) fence->wait(deadline, poll);",
        "",
        "test_leases.py::test_work_on_a_stream_outlives_the_release",
    ),
    Mutation(
        "the backing epoch stands still",
        "csrc/residency.cpp",
        "layer.model->backing_epoch.fetch_add(1, std::memory_order_release);",
        "{}",
        "test_leases.py::test_the_backing_epoch_tells_that_granules_changed",
    ),
    Mutation(
        "ids claimed for a failed start are lost",
        "csrc/transfer.cpp",
        "arena.return_uncreated(fresh);",
        "",
        "test_fault_walk.py::test_a_failing_driver_call_loses_nothing[host-grow_again-once]",
    ),
    Mutation(
        "granules taken for a failed start are lost",
        "csrc/transfer.cpp",
        "arena.give(granules);",
        "",
        "test_fault_walk.py::test_a_failing_driver_call_loses_nothing[host-lease_that_evicts-once]",
    ),
    Mutation(
        "refused releases are forgotten",
        "csrc/vmm.cpp",
        "refused_.emplace_back(primitive, std::move(release));",
        "",
        "test_fault_walk.py::test_a_close_that_fails_goes_on_when_called_again[host-staged-once]",
    ),
    Mutation(
        "held models are victims",
        "csrc/residency.cpp",
        "if (model.get() == &except || model->holds > 0) continue;",
        "if (model.get() == &except) continue;",
        "test_state_machine.py::test_every_interleaving_keeps_the_rules[host]",
    ),
    Mutation(
        "victims go in another order",
        "csrc/residency.cpp",
        "-static_cast<std::int64_t>(layer->index));",
        "static_cast<std::int64_t>(layer->index));",
        "test_state_machine.py::test_every_interleaving_keeps_the_rules[host]",
    ),
    Mutation(
        "a staging chunk is reused before its copy is over",
        "csrc/uploads.cpp",
        "if (flight.event->complete()) return true;",
        "return true;",
        "test_state_machine.py::test_every_interleaving_keeps_the_rules[host-staged]",
    ),
    Mutation(
        "leases pass those in line",
        "csrc/lease.cpp",
        "if (!(line_.empty() && fits(*hold)) && !nested(*hold)) return false;",
        "if (!fits(*hold) && !nested(*hold)) return false;",
        "test_leases.py::test_leases_are_served_in_order_of_arrival",
    ),
    Mutation(
        "leases wait for each other",
        "csrc/lease.cpp",
        "if (granules > books_.arena.capacity()) return true;",
        "",
        "test_leases.py::test_two_leases_that_would_wait_for_each_other",
    ),
    Mutation(
        "a changed file is not noticed",
        "csrc/source.cpp",
        "file.check_unchanged();",
        "",
        "test_bad_input.py::test_a_file_that_changes_between_two_loads",
    ),
    Mutation(
        "an earlier tenant's bytes stay in the padding",
        "csrc/source.cpp",
        "std::memset(memory, 0, bytes);",
        "(void)memory, (void)bytes;",
        "test_views.py::test_read_back_is_what_the_device_has",
    ),
    Mutation(
        "weights are writable",
        "csrc/backing.cpp",
        "layer.model->writable ? Access::read_write : Access::read",
        "Access::read_write",
        "test_bad_input.py::test_an_in_place_write_to_weights_faults",
    ),
    Mutation(
        "a child inherits the weights",
        "csrc/driver/host.cpp",
        "return ::madvise(memory, bytes, MADV_DONTFORK);",
        "return 0 * (memory != nullptr) * (bytes != 0);",
        "test_bad_input.py::test_fork_gives_the_child_an_error_and_spares_the_parent",
    ),
    Mutation(
        "signals wait until a fence is reached",
        "csrc/vmm.cpp",
        "if (poll) poll();",
        "(void)poll;",
        "test_leases.py::test_signals_are_seen_in_every_wait[host-evict]",
    ),
    Mutation(
        "a cancelled layer is kept as if it were complete",
        "csrc/transfer.cpp",
        "layer.torn = true;",
        "",
        "test_fault_walk.py::test_a_failing_driver_call_loses_nothing[host-cancel-once]",
    ),
    Mutation(
        "a checked accessor does not check",
        "warmserve_rt/views.py",
        "if not self._held():",
        "if False:",
        "test_leases.py::test_checked_accessors_refuse_when_the_lease_is_over",
    ),
]


def run(tree: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "WARMSERVE_BUILD_JOBS": "2"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def build(tree: Path) -> None:
    done = run(tree, "setup.py", "-q", "build_ext", "--inplace")
    if done.returncode:
        raise SystemExit(f"the tree does not build:\n{done.stderr}")


def test(tree: Path, name: str) -> bool:
    """Whether the test passes; one that hangs or crashes has failed."""
    options = ("-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=first-failure")
    try:
        return run(tree, "-m", "pytest", *options, f"tests/{name}").returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main(names: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        ignore = shutil.ignore_patterns(".*", "build", "*.so", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=ignore)
        build(tree)
        for name in sorted({mutation.test for mutation in chosen}):
            if not test(tree, name):
                raise SystemExit(f"{name} fails without a mutation")
        for mutation in chosen:
            start = time.monotonic()
            path = tree / mutation.file
            original = path.read_text()
            if original.count(mutation.line) != 1:
                raise SystemExit(f"{mutation.name}: its line is not once in {mutation.file}")
            path.write_text(original.replace(mutation.line, mutation.instead))
            build(tree)
            caught = not test(tree, mutation.test)
            path.write_text(original)
            verdict = "caught" if caught else "SURVIVED"
            print(f"{verdict}: {mutation.name} ({time.monotonic() - start:.0f} s)", flush=True)
            if not caught:
                survivors.append(mutation.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
