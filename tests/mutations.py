"""Break one line of the sources at a time and run the test that must fail because of it.

    python tests/mutations.py [NAME ...]

Each mutant runs in its own copy of a built tree, so that only the file it changes is compiled
again, and none for a mutant in Python. As many mutants run at once as the process has CPUs. The
exit status is 1 if a mutant survives or no longer applies.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

HANG_S = 120  # a test that takes longer hangs; beside other work the slowest takes 50 s


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    line: str
    instead: str
    test: str


MUTATIONS = [
    Mutation(
        "an eviction does not wait for the fences of its layers",
        "csrc/model/mapping.cpp",
        "for (const auto& fence : fences) wait_unless_lost(*fence, deadline, poll);",
        "",
        "runtime/test_leases.py::test_work_on_a_stream_outlives_the_release",
    ),
    Mutation(
        "a lease does not record the streams that are current at its release",
        "warmserve_rt/core/lease_streams.py",
        "{**self._at_acquire, **now}",
        "self._at_acquire",
        "cuda/test_lease_streams.py::"
        "test_the_streams_of_the_acquisition_and_of_the_release_are_recorded[torch]",
    ),
    Mutation(
        "a lease ends in a capture and loses the record of its stream",
        "warmserve_rt/core/lease_streams.py",
        '_refuse_captured("end", used)',
        "",
        "cuda/test_lease_streams.py::"
        "test_a_lease_that_cannot_end_in_a_capture_is_held_and_loses_no_record[cupy]",
    ),
    Mutation(
        "a step of vLLM records only the stream that is current when it begins",
        "warmserve_rt/engines/vllm/worker.py",
        "lease.acquire()",
        "lease.acquire(torch.cuda.current_stream())",
        "engines/test_engine_streams.py::"
        "test_a_step_records_the_stream_that_vllm_sets_under_the_lease[1]",
    ),
    Mutation(
        "the backing epoch does not advance",
        "csrc/model/state.cpp",
        "layer.model->backing_epoch.fetch_add(1, std::memory_order_release);",
        "{}",
        "runtime/test_leases.py::test_the_backing_epoch_tells_that_granules_changed",
    ),
    Mutation(
        "an unregistered model keeps the streams that used its layers",
        "csrc/runtime/eviction.cpp",
        "return {std::move(model.reservation), std::exchange(model.uses, {})};",
        "return {std::move(model.reservation), {}};",
        "runtime/test_streaming_leases.py::test_an_unregistered_model_keeps_no_stream[host]",
    ),
    Mutation(
        "granule ids claimed by a load that fails to start are lost",
        "csrc/load/loader_start.cpp",
        "arena.return_trimmed(fresh);",
        "",
        "runtime/test_fault_walk.py::"
        "test_a_failing_driver_call_loses_nothing[host-grow_again-once]",
    ),
    Mutation(
        "granules taken by a load that fails to start are lost",
        "csrc/load/loader_start.cpp",
        "arena.give(granules);",
        "",
        "runtime/test_fault_walk.py::"
        "test_a_failing_driver_call_loses_nothing[host-lease_that_evicts-once]",
    ),
    Mutation(
        "a release that the driver refused is not tried again",
        "csrc/memory/vmm.cpp",
        "refused_.emplace_back(primitive, std::move(release));",
        "",
        "runtime/test_fault_walk.py::"
        "test_a_close_that_fails_goes_on_when_called_again[host-staged-once]",
    ),
    Mutation(
        "the layers of held models are evicted to make room",
        "csrc/model/eviction_order.cpp",
        "if (model->whole_holds || spared.whole_model(*model)) continue;",
        "if (spared.whole_model(*model)) continue;",
        "runtime/test_state_machine.py::test_every_interleaving_keeps_the_rules[host]",
    ),
    Mutation(
        "a pass does not hold the layers of its lease",
        "csrc/runtime/lease_queue.cpp",
        "pass->depth = 1;",
        "pass->depth = 1; return pass;",
        "engines/test_passes.py::test_evictions_wait_for_a_pass_as_for_streams",
    ),
    Mutation(
        "an eviction does not wait for passes",
        "csrc/runtime/eviction.cpp",
        "const auto held = [&] { return any([](const Layer& l) { return l.held(); }); };",
        "const auto held = leased;",
        "engines/test_passes.py::test_evictions_wait_for_a_pass_as_for_streams",
    ),
    Mutation(
        "an eviction waits for its own thread's pass",
        "csrc/runtime/eviction.cpp",
        "if (lease_queue_.in_pass(lock, selection, this_thread()))",
        "if (false)",
        "engines/test_passes.py::test_a_thread_cannot_wait_for_its_own_pass",
    ),
    Mutation(
        "the layers of a model are evicted from the first to the last",
        "csrc/model/eviction_order.cpp",
        "-static_cast<std::int64_t>(layer.index)};",
        "static_cast<std::int64_t>(layer.index)};",
        "runtime/test_state_machine.py::test_every_interleaving_keeps_the_rules[host]",
    ),
    Mutation(
        "a staging chunk is reused before its copy is complete",
        "csrc/load/copy_engine.cpp",
        "if (event->complete()) return Copies::over;",
        "return Copies::over;",
        "runtime/test_state_machine.py::test_every_interleaving_keeps_the_rules[host-staged]",
    ),
    Mutation(
        "a chunk is copied over two links",
        "csrc/load/copy_engine.cpp",
        "link->in_flight.push_back(pending);",
        "link->in_flight.push_back(pending);\n    begin_on_own_link(pending);",
        "runtime/test_routes.py::test_a_load_goes_over_both_links",
    ),
    Mutation(
        "a copy that failed on a route is taken for complete",
        "csrc/load/copy_engine.cpp",
        "case RouteCopy::State::failed: return Copies::failed;",
        "case RouteCopy::State::failed: return Copies::over;",
        "runtime/test_routes.py::test_a_peer_whose_context_dies_costs_no_bytes",
    ),
    Mutation(
        "background copies use the links of peers",
        "csrc/load/links.cpp",
        "if (urgent && links_.size() > 1)",
        "if (links_.size() > 1)",
        "runtime/test_routes.py::test_a_background_load_uses_no_route",
    ),
    Mutation(
        "a lease that fits is admitted ahead of those that wait",
        "csrc/runtime/lease_queue.cpp",
        "if (!(waiting_.empty() && fits(lock, *lease)) && !nested(*lease)) return false;",
        "if (!fits(lock, *lease) && !nested(*lease)) return false;",
        "runtime/test_leases.py::test_leases_are_served_in_order_of_arrival",
    ),
    Mutation(
        "two leases may wait for each other for ever",
        "csrc/runtime/lease_queue.cpp",
        "if (granules > state_.arena.capacity()) return true;",
        "",
        "runtime/test_leases.py::test_one_of_two_leases_that_would_wait_for_each_other_is_refused",
    ),
    Mutation(
        "a stream does not wait for the copies of its layer",
        "csrc/runtime/leases.cpp",
        "for (const auto& event : *copies) stream->wait_for(*event);",
        "",
        "runtime/test_streaming_leases.py::test_the_stream_waits_instead_of_the_caller[simcuda]",
    ),
    Mutation(
        "recording a stream for a model also covers layers that no lease holds",
        "csrc/runtime/leases.cpp",
        "    if (layer.held()) leased.insert(layer.index);",
        "    leased.insert(layer.index);",
        "runtime/test_streaming_leases.py::test_a_leased_model_can_record_a_stream[simcuda]",
    ),
    Mutation(
        "a lease shows tensors of layers that have not arrived",
        "warmserve_rt/core/views.py",
        "if not self._here(layer):",
        "if False:",
        "runtime/test_streaming_leases.py::"
        "test_a_streaming_lease_begins_before_its_layers_arrive[host]",
    ),
    Mutation(
        "a thread that joins a lease waits in the queue",
        "csrc/runtime/leases.cpp",
        "  lease_queue_.admit(lock, shared);\n",
        "  if (!lease_queue_.try_admit(lock, shared)) throw Error(ErrorKind::busy, {});\n",
        "runtime/test_streaming_leases.py::test_joining_a_shared_lease_does_not_wait_in_line[host]",
    ),
    Mutation(
        "the layers of a ticket evict each other",
        "csrc/load/loader_start.cpp",
        "return ticket.wants_layer(layer);",
        "return !ticket.wants_layer(layer);",
        "runtime/test_state_machine.py::test_every_interleaving_keeps_the_rules[host]",
    ),
    Mutation(
        "a layer that an earlier prewarm wanted keeps its place in the queue under a lease",
        "csrc/load/load_queue.cpp",
        "if (rank < load.rank) rank.sequence = sequence_++;",
        "",
        "runtime/test_partial_residency.py::test_the_layers_of_a_lease_come_in_order[host]",
    ),
    Mutation(
        "background bytes are counted as foreground bytes",
        "csrc/load/load_queue.cpp",
        "(load.foreground() ? foreground_bytes_ : background_bytes_) +=",
        "(load.foreground() ? foreground_bytes_ : foreground_bytes_) +=",
        "runtime/test_partial_residency.py::"
        "test_the_background_keeps_its_share_and_no_more[host-0.25]",
    ),
    Mutation(
        "tickets do not expire at their deadlines",
        "csrc/load/loader.cpp",
        "queue_.expire(lock);",
        "",
        "runtime/test_partial_residency.py::test_a_ticket_past_its_deadline_is_cancelled[host]",
    ),
    Mutation(
        "a changed file is not noticed",
        "csrc/model/source.cpp",
        "file.check_unchanged(!source.digests.empty());",
        "",
        "runtime/test_bad_input.py::test_a_file_changed_between_two_loads_is_refused",
    ),
    Mutation(
        "digests are not compared",
        "csrc/load/loader.cpp",
        "const auto wrong = last && !cached ? wrong_content(load) : nullptr",
        "const std::exception_ptr wrong = nullptr",
        "checkpoint/test_checkpoint_changes.py::"
        "test_a_digest_finds_a_change_that_no_time_stamp_shows[host]",
    ),
    Mutation(
        "a restarted load keeps the digests of its failed attempt",
        "csrc/load/layer_load.cpp",
        "sums.clear();",
        "",
        "checkpoint/test_checkpoint_changes.py::test_a_load_that_starts_again_has_new_digests",
    ),
    Mutation(
        "a symbolic link out of the directory is followed",
        "warmserve_rt/checkpoint/directory.py",
        "return open_path(part, folder=folders[-1], follow=False)",
        "return open_path(part, folder=folders[-1], follow=True)",
        "checkpoint/test_checkpoint_files.py::test_links_out_of_a_directory_are_refused",
    ),
    Mutation(
        "an earlier tenant's bytes stay in the padding",
        "csrc/model/source.cpp",
        "std::memset(memory, 0, bytes);",
        "(void)memory, (void)bytes;",
        "runtime/test_views.py::test_read_back_returns_the_device_s_bytes",
    ),
    Mutation(
        "loads evict beside each other",
        "csrc/load/loader_start.cpp",
        "[&](const LayerLoad* other) { return other->rank < load.rank; });",
        "[&](const LayerLoad* other) { return other == &load; });",
        "runtime/test_eviction_order.py::test_a_load_evicts_before_those_behind_it",
    ),
    Mutation(
        "a load that waits for the device keeps those behind it from evicting",
        "csrc/load/loader_start.cpp",
        "if (std::erase(evicting_, &load)) state_.wake();",
        "",
        "runtime/test_eviction_order.py::"
        "test_a_load_that_waits_for_the_device_lets_those_behind_it_evict",
    ),
    Mutation(
        "a layer of a changed file is served from the host cache",
        "csrc/load/copy_engine.cpp",
        "check_files_unchanged(model.files, layer.source, begin, end);",
        "",
        "runtime/test_host_cache.py::"
        "test_a_changed_file_is_never_served_from_the_cache[touch-host-staged]",
    ),
    Mutation(
        "a reload keeps the images of the old files",
        "csrc/runtime/runtime.cpp",
        "host_cache_.drop(lock, *model);",
        "",
        "runtime/test_host_cache.py::"
        "test_a_changed_file_is_never_served_from_the_cache[replace-host-staged]",
    ),
    Mutation(
        "the device does not write the zeros behind a layer",
        "csrc/load/copy_engine.cpp",
        "stream_->fill_zero(copy.to, copy.bytes);",
        "{}",
        "runtime/test_padding.py::test_bytes_behind_a_layer_are_zero[simcuda-1000]",
    ),
    Mutation(
        "every block of a cast reads the start of the slice",
        "csrc/model/source.cpp",
        "source += elements * width.from;",
        "",
        "checkpoint/test_dtype.py::test_tensors_are_cast_as_torch_does[host-float32-8MiB]",
    ),
    Mutation(
        "floats in the module of a packed tensor are cast",
        "warmserve_rt/checkpoint/dtypes.py",
        "if below or _module(name) in modules:",
        "if below:",
        "checkpoint/test_dtype.py::test_quantised_layers_stay_exact",
    ),
    Mutation(
        "a name still stands for a model after it is unregistered",
        "warmserve_rt/core/revisions.py",
        "if self._current.get(name) is model:",
        "if False:",
        "runtime/test_revisions.py::test_a_name_whose_revision_is_gone_is_unknown[host]",
    ),
    Mutation(
        "weights are mapped as writable",
        "csrc/model/mapping.cpp",
        "model.writable ? Access::read_write : Access::read",
        "Access::read_write",
        "runtime/test_bad_input.py::test_an_in_place_write_to_weights_faults",
    ),
    Mutation(
        "a forked child inherits the weights",
        "csrc/driver/host/host.cpp",
        "return ::madvise(memory, bytes, MADV_DONTFORK);",
        "return 0 * (memory != nullptr) * (bytes != 0);",
        "runtime/test_bad_input.py::test_fork_gives_the_child_an_error_and_spares_the_parent",
    ),
    Mutation(
        "a wait for a fence does not poll for signals",
        "csrc/memory/vmm.cpp",
        '"a stream did not reach its fence in time");\n    if (poll) poll();',
        '"a stream did not reach its fence in time");\n    (void)poll;',
        "runtime/test_leases.py::test_signals_are_seen_in_every_wait[host-evict]",
    ),
    Mutation(
        "a layer whose load failed is not marked as having invalid bytes",
        "csrc/load/loader_end.cpp",
        "layer.unmap_failed = true;",
        "",
        "runtime/test_fault_walk.py::"
        "test_a_failing_driver_call_loses_nothing[host-step_by_step-and-in-rollback]",
    ),
    Mutation(
        "a checked accessor does not check that its lease is held",
        "warmserve_rt/core/views.py",
        "if not self._held():",
        "if False:",
        "runtime/test_leases.py::test_checked_accessors_refuse_when_the_lease_is_over",
    ),
    Mutation(
        "the simulator does not report a read that races with an earlier write",
        "csrc/simcuda/shadow.cpp",
        "if (overlaps && !before && (write || earlier.write)) race = true;",
        "if (overlaps && !before && write) race = true;",
        "simcuda/test_simcuda_races.py::test_the_found_races_do_not_depend_on_timing[0]",
    ),
    Mutation(
        "the simulator does not report memory that is unmapped while in use",
        "csrc/simcuda/api_vmm.cpp",
        'call.sim->detector.take_away(mapping->uses, "unmapped", "cuMemUnmap", call.number);',
        "",
        "simcuda/test_simcuda_behaviour.py::"
        "test_a_wait_of_a_stream_is_not_a_wait_of_the_host[virtual]",
    ),
    Mutation(
        "the simulated time advances while a thread of the program runs",
        "csrc/simcuda/concurrent.cpp",
        "all = all && threads_.all_asleep(asleep);",
        "",
        "simcuda/test_simcuda_costs.py::test_the_clock_stands_while_a_thread_runs",
    ),
    Mutation(
        "simulated mapping calls of several threads overlap",
        "csrc/simcuda/concurrent.cpp",
        "if (!std::exchange(wanted.held, true)) return;",
        "if (!std::exchange(wanted.held, true) || true) return;",
        "simcuda/test_simcuda_costs.py::test_mapping_calls_take_turns[True-3]",
    ),
    Mutation(
        "a load's reads take no time on the simulated device",
        "csrc/load/copy_engine.cpp",
        "arena_.device()->driver().host_read(end - begin);",
        "",
        "simcuda/test_simcuda_costs.py::test_a_load_takes_the_time_of_its_reads[1]",
    ),
    Mutation(
        "the simulator reads pinned memory when a copy is enqueued",
        "csrc/simcuda/api_copy.cpp",
        "if (copy.from_place == Place::pageable && !stream.capture) {",
        "if (copy.from_place != Place::device && !stream.capture) {",
        "simcuda/test_simcuda_behaviour.py::"
        "test_pinned_sources_are_read_late_and_pageable_ones_early[virtual-True]",
    ),
    Mutation(
        "the simulator reads pageable memory when a copy runs",
        "csrc/simcuda/api_copy.cpp",
        "if (copy.from_place == Place::pageable && !stream.capture) {",
        "if (false) {",
        "simcuda/test_simcuda_behaviour.py::"
        "test_pinned_sources_are_read_late_and_pageable_ones_early[virtual-False]",
    ),
    Mutation(
        "the simulator writes to read-only memory",
        "csrc/simcuda/execute.cpp",
        "if ((piece.mapping->access[operation.context->device] & need) != need)",
        "if (false)",
        "simcuda/test_simcuda_behaviour.py::"
        "test_access_that_changes_under_a_copy_kills_it[virtual]",
    ),
    Mutation(
        "the simulator unregisters host memory without waiting for the context's work",
        "csrc/simcuda/api_memory.cpp",
        'take_away(pinned->uses, "unregistered", "cuMemHostUnregister", call.number);\n'
        "  const CUresult state = call.sim->drain_context(call.lock, call.context);",
        'take_away(pinned->uses, "unregistered", "cuMemHostUnregister", call.number);\n'
        "  const CUresult state = state_of(*call.context);",
        "simcuda/test_simcuda_behaviour.py::test_unregistering_waits_for_all_work[virtual]",
    ),
    Mutation(
        "the simulator does not invalidate a capture that a forbidden call disturbs",
        "csrc/simcuda/capture.cpp",
        "    capture->invalid = true;\n    result = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;",
        "    result = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;",
        "simcuda/test_simcuda_capture.py::"
        "test_a_call_of_another_thread_can_invalidate_a_capture[allocate-0-0-True]",
    ),
    Mutation(
        "loading breaks a stream capture of another thread",
        "csrc/driver/cuda/context.cpp",
        "cuda.cuThreadExchangeStreamCaptureMode(&mode_));",
        "cuda.cuThreadExchangeStreamCaptureMode(&(mode_ = CU_STREAM_CAPTURE_MODE_GLOBAL)));",
        "cuda/test_cuda_interop.py::test_a_load_does_not_invalidate_a_capture_of_other_code",
    ),
    Mutation(
        "the calling thread's current context is not restored",
        "csrc/driver/cuda/context.cpp",
        "if (switched_) cuda.cuCtxSetCurrent(before_);",
        "",
        "cuda/test_cuda_interop.py::test_a_load_restores_the_thread_s_context_and_capture_mode",
    ),
    Mutation(
        "a lost context is called again",
        "csrc/driver/cuda/context.cpp",
        "lost_.compare_exchange_strong(none, result);  // only the first error is kept",
        "static_cast<void>(none);",
        "cuda/test_cuda_device.py::test_a_lost_device_says_so_at_every_later_call",
    ),
    Mutation(
        "mappings that a failed map could not undo are forgotten",
        "csrc/driver/cuda/cuda.cpp",
        "stuck_[address] = mapped;",
        "",
        "runtime/test_fault_walk.py::"
        "test_a_failing_driver_call_loses_nothing[simcuda-lease-and-in-rollback]",
    ),
    Mutation(
        "the arena grows back into the headroom",
        "csrc/memory/arena.cpp",
        'if (headroom_bytes_) require_memory(granule_bytes_, "a granule");',
        "",
        "cuda/test_cuda_device.py::test_the_headroom_is_left_alone_and_reported",
    ),
    Mutation(
        "gates removed under one lease are not installed again under another",
        "warmserve_rt/engines/torch/gates.py",
        "if epoch != self._epoch:",
        "if not self._epoch:",
        "engines/test_transformers_engine.py::"
        "test_a_gate_is_removed_when_its_layer_arrives_and_returns_for_other_leases",
    ),
    Mutation(
        "a new copy takes the room of wider ones",
        "warmserve_rt/policy/_places.py",
        "crowds = crowding(devices.free, first, width, more, node)",
        "crowds = 0.0",
        "policy/test_improve.py::test_a_new_copy_leaves_room_for_wider_ones[free1-5]",
    ),
    Mutation(
        "new copies crowd on the first of equal devices",
        "warmserve_rt/policy/_places.py",
        "better = crowds < least or (crowds == least and room > most)",
        "better = crowds < least",
        "policy/test_improve.py::test_a_new_copy_leaves_room_for_wider_ones[free0-3]",
    ),
    Mutation(
        "streams are asked under the runtime's lock whether they have passed their fences",
        "csrc/runtime/leases.cpp",
        "for (const Use& use : model.uses) past.push_back(use.fence);",
        "for (const Use& use : model.uses)\n"
        "      if (passed(*use.fence)) past.push_back(use.fence);",
        "runtime/test_driver_locks.py::test_many_recorded_streams[host]",
    ),
    Mutation(
        "a stream that is being captured is recorded",
        "csrc/memory/vmm.cpp",
        "    stream_->refuse_capture();",
        "",
        "cuda/test_cuda_streams.py::test_a_stream_in_a_capture_is_refused",
    ),
    Mutation(
        "an eviction does not wait for the end of a capture",
        "csrc/memory/vmm.cpp",
        "  stream_->await_capture_end(deadline, poll);",
        "",
        "cuda/test_cuda_streams.py::test_a_lease_released_inside_a_capture_keeps_earlier_work_safe",
    ),
    Mutation(
        "the work of a destroyed stream is not waited for",
        "csrc/memory/vmm.cpp",
        "    stream_->device()->synchronize();",
        "    {}",
        "cuda/test_cuda_streams.py::test_work_of_a_stream_that_was_destroyed_is_waited_for",
    ),
    Mutation(
        "a stream of another context is accepted",
        "csrc/driver/cuda/cuda.cpp",
        "if (context != context_.handle()) {",
        "if (false) {",
        "cuda/test_cuda_streams.py::test_streams_of_another_device_or_context_are_refused",
    ),
    Mutation(
        "an error of another's stream loses the device",
        "csrc/driver/cuda/context.cpp",
        "if (is_sticky(result) && !works()) {",
        "if (is_sticky(result)) {",
        "cuda/test_cuda_streams.py::test_the_error_of_another_s_stream_does_not_lose_the_device",
    ),
    Mutation(
        "a fence of the device waits for the recorded streams only",
        "csrc/model/mapping.cpp",
        "if (state.fence_device) synchronize_unless_lost(*state.arena.device());",
        "",
        "cuda/test_unrecorded_work.py::test_unrecorded_work_is_waited_for_with_a_fence_of_the_device[device]",
    ),
    Mutation(
        "memory is pinned for each layer that is read",
        "csrc/runtime/inspect.cpp",
        "readers_.push_back(std::move(reader));",
        "{}",
        "cuda/test_cuda_calls.py::test_reading_layers_registers_no_memory_per_call",
    ),
    Mutation(
        "a feature that was refused for a granule is requested again",
        "csrc/driver/cuda/granules.cpp",
        "kind_.allocFlags = kind.allocFlags;",
        "",
        "cuda/test_cuda_calls.py::test_a_feature_that_the_nth_granule_lacks_is_dropped_for_the_rest",
    ),
    Mutation(
        "a peer gets access before it has a context",
        "csrc/driver/cuda/context.cpp",
        "const CUresult result = library_.cuDevicePrimaryCtxRetain(&context, peer);",
        "const CUresult result = CUDA_SUCCESS;",
        "cuda/test_cuda_calls.py::test_a_peer_has_a_context_before_access_is_set",
    ),
    Mutation(
        "a copy to the host is enqueued with the interpreter's lock",
        "csrc/bind/handles.cpp",
        "const py::gil_scoped_release release;  // a copy to pageable memory waits for the stream",
        "",
        "cuda/test_interpreter_lock.py::test_other_threads_run_while_the_driver_is_called",
    ),
    Mutation(
        "loader threads run on at the exit if a model is leased",
        "warmserve_rt/core/_at_exit.py",
        "runtime._stop()",
        "pass",
        "cuda/test_cuda_device.py::test_the_loader_threads_end_at_exit_whatever_is_leased",
    ),
    Mutation(
        "a descriptor for another process can be opened again for writing",
        "csrc/driver/host/slots.cpp",
        "::fchmod(memfd_, S_IRUSR | S_IWUSR) != 0",
        "false",
        "runtime/test_shared_granules.py::test_the_descriptor_cannot_write",
    ),
    Mutation(
        "an imported granule keeps its file open",
        "csrc/driver/host/host.cpp",
        "imports_.remove(gone.file);",
        "{}",
        "runtime/test_shared_granules.py::test_importers_hold_one_descriptor_per_file",
    ),
    Mutation(
        "the CUDA driver lets a process write a granule of another one",
        "csrc/driver/cuda/cuda.cpp",
        "granules_.mapped(address, {handles, count});",
        "",
        "simcuda/test_simcuda_processes.py::test_driver_refuses_to_write_an_import",
    ),
    Mutation(
        "a simulated importer does not know what the exporter wrote",
        "csrc/simcuda/memory_shared.cpp",
        "physical->shadow.share(file.get());",
        "",
        "simcuda/test_simcuda_processes.py::test_bytes_are_written_for_the_importer_too",
    ),
    Mutation(
        "a simulated machine counts what dead processes held",
        "csrc/simcuda/machine.cpp",
        "shared.pool == pool && (shared.holders & living)",
        "shared.pool == pool && shared.holders",
        "simcuda/test_simcuda_processes.py::test_the_bytes_of_other_processes_count_once",
    ),
    Mutation(
        "a broker reuses granules that clients still map",
        "csrc/model/mapping.cpp",
        "if (clients) clients->revoke(layers, poll);",
        "",
        "processes/test_broker_failures.py::"
        "test_a_load_waits_for_a_stopped_client_if_nothing_else_can_be_evicted",
    ),
    Mutation(
        "a client gives layers up while leases use them",
        "csrc/model/state.cpp",
        "if (layer.held() && !yielded.contains(layer.index)) continue;",
        "",
        "processes/test_broker_sharing.py::test_a_lease_of_one_client_blocks_another_until_it_ends",
    ),
    Mutation(
        "a guard that is dropped while it is held leaves its lease",
        "csrc/runtime/guard.cpp",
        "if (lease_) runtime_.end_lease(lock, lease_);",
        "",
        "processes/test_guards.py::"
        "test_a_guard_that_is_dropped_while_it_is_held_ends_its_hold[client]",
    ),
    Mutation(
        "a guard keeps its lease although another lease waits",
        "csrc/runtime/guard.cpp",
        "runtime_.attachment_ && !runtime_.lease_queue_.any_waits()",
        "runtime_.attachment_ != nullptr",
        "processes/test_guards.py::test_threads_may_share_a_guard[client]",
    ),
    Mutation(
        "a served arena is trimmed",
        "csrc/runtime/eviction.cpp",
        "  if (state_.clients)\n",
        "  if (false)\n",
        "processes/test_guards.py::test_a_served_arena_is_not_trimmed",
    ),
    Mutation(
        "a broker that is started again takes granules that clients map",
        "csrc/broker/returning.cpp",
        "runtime_.set_aside(client->record->all_marked());",
        "",
        "processes/test_broker_restart.py::"
        "test_a_client_that_is_stopped_over_a_restart_keeps_its_granules",
    ),
    Mutation(
        "an eviction does not ask clients that have not come back",
        "csrc/broker/revoking.cpp",
        "if (!client->settled) recognize(*client, layers);",
        "static_cast<void>(client);",
        "processes/test_broker_restart.py::"
        "test_others_read_the_layers_of_a_stopped_client_without_loading",
    ),
    Mutation(
        "granules are freed although a client may still map them",
        "csrc/model/mapping.cpp",
        "if (!layer->mapping && (reusable || layer->granules.empty())) {",
        "if (!layer->mapping) {",
        "processes/test_broker_restart.py::"
        "test_granules_of_a_stopped_client_stay_although_a_load_of_its_layers_fails",
    ),
    Mutation(
        "a client does not say which layers it still maps",
        "csrc/runtime/attachment_again.cpp",
        "if (!layer.granules.empty()) mapped[ids[i]].push_back(layer.index);",
        "static_cast<void>(layer);",
        "processes/test_broker_restart.py::test_a_client_that_has_come_back_gives_layers_up",
    ),
    Mutation(
        "the next broker does not know what a client maps",
        "csrc/broker/returning.cpp",
        "client.record->mark(granules);",
        "",
        "processes/test_broker_restart.py::"
        "test_a_client_that_is_stopped_over_a_restart_keeps_its_granules",
    ),
    Mutation(
        "a layer is said to be in granules that were overwritten",
        "csrc/load/loader_start.cpp",
        "arena.forget(layer.granules);",
        "",
        "runtime/test_remembered_layers.py::test_random_loads_and_evictions_give_right_bytes",
    ),
]


def run(
    tree: Path, *command: str, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "WARMSERVE_BUILD_JOBS": "2", **more}
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def build(tree: Path, flags: str = "") -> None:
    more = {"WARMSERVE_KERNELS": "none", "WARMSERVE_CXXFLAGS": flags}  # no test needs GPU kernels
    done = run(tree, "setup.py", "-q", "build_ext", "--inplace", timeout=1200, **more)
    if done.returncode:
        raise SystemExit(f"the build failed:\n{done.stderr}")


def precompile_standard_headers(folder: Path) -> str:
    """Compile the headers that tests/native compiles once; return the flags of a quick compilation.

    At -Og a file compiles faster than at -O0, which keeps every function of a header.
    """
    header = folder / "standard.h"
    shutil.copy(ROOT / "tests" / "native" / "standard.h", header)
    compile_it = ["g++", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-g0", "-Og"]
    subprocess.run([*compile_it, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
    return f"-Og -include {header}"


def failure(tree: Path, *names: str) -> str | None:
    """Run tests and return their output if one fails, else None. A hang or crash is a failure."""
    options = ("-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=first-failure")
    # Importing the other plugins that are installed takes longer than most of the tests.
    plugin = ("-p", "_hypothesis_pytestplugin")
    try:
        done = run(
            tree,
            *("-m", "pytest", *options, *plugin, *(f"tests/{name}" for name in names)),
            timeout=HANG_S * len(names),
            PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        )
    except subprocess.TimeoutExpired:
        return f"the tests did not end within {HANG_S} s each"
    return f"{done.stdout}{done.stderr}" if done.returncode else None


def copy_sources(tree: Path) -> None:
    """Copy this tree and its object files, so that only files newer than these are compiled."""
    ignore = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignore)
    for objects in (ROOT / "build").glob("temp.*"):
        shutil.copytree(objects, tree / "build" / objects.name)


def survives(built: Path, flags: str, tree: Path, mutation: Mutation) -> bool:
    shutil.copytree(built, tree)  # keeps file times, so that only the mutated file is compiled
    path = tree / mutation.file
    path.write_text(path.read_text().replace(mutation.line, mutation.instead))
    if path.suffix != ".py":
        build(tree, flags)
    passes = failure(tree, mutation.test) is None
    shutil.rmtree(tree)
    return passes


def main(names: list[str], *, check_first: bool = True) -> int:
    """Print for each of these mutants, or for all, whether its test notices it.

    Return 1 if one survives. With `check_first`, raise SystemExit if a test fails without a
    mutation; only a caller that runs the whole suite may do without.
    """
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    for mutation in chosen:
        if (ROOT / mutation.file).read_text().count(mutation.line) != 1:
            raise SystemExit(f"{mutation.name}: its line must occur once in {mutation.file}")
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "built")
        copy_sources(built)
        build(built)
        flags = precompile_standard_headers(Path(folder))

        def verdict(number: int) -> bool:
            start, mutation = time.monotonic(), chosen[number]
            survived = survives(built, flags, Path(folder, f"mutant-{number}"), mutation)
            said = "SURVIVED" if survived else "caught"
            print(f"{said}: {mutation.name} ({time.monotonic() - start:.0f} s)", flush=True)
            return survived

        workers = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(workers) as pool:
            needed = sorted({mutation.test for mutation in chosen}) if check_first else []
            # One process per CPU runs its share of the tests, because starting an interpreter
            # takes most of a test's time.
            shares = [share for n in range(workers) if (share := needed[n::workers])]
            for said in pool.map(lambda share: failure(built, *share), shares):
                if said:
                    raise SystemExit(f"a test fails without a mutation:\n{said}")
            for mutation, survived in zip(
                chosen, pool.map(verdict, range(len(chosen))), strict=True
            ):
                if survived:
                    survivors.append(mutation.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
