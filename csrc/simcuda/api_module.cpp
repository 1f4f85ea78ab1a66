// Modules and kernels. An image is recognised but not read: its functions are always the weight
// kernels. As on an H200, loading a module is not an unsafe call during a capture.
#include <cstring>

#include "simcuda/call.h"
#include "simcuda/capture.h"

namespace warmserve::simcuda {
namespace {

constexpr std::size_t kMostParameters = 4096;  // bytes

// Recognises an image by its first bytes: a fat binary, a cubin, PTX, or the simulator's
// placeholder.
bool is_image(const void* image) {
  const auto begins = [&](const char* with) {
    return std::strncmp(static_cast<const char*>(image), with, std::strlen(with)) == 0;
  };
  for (const char* with : {"\x50\xed\x55\xba", "\177ELF", ".version", "//", "simulated"})
    if (begins(with)) return true;
  return false;
}

CUresult load(Call& call, CUmodule* out, const void* image) {
  if (!out || !image) return CUDA_ERROR_INVALID_VALUE;
  if (!is_image(image)) return CUDA_ERROR_INVALID_IMAGE;
  *out = call.sim->modules.add(std::make_shared<Module>(Module{call.context}));
  return CUDA_SUCCESS;
}

bool is_kernel(const char* name) {
  static const std::byte nothing[kMostParameters]{};
  KernelCall parsed;
  return parse_kernel(name, nothing, &parsed);
}

// Returns the kernel's only parameter, given by address or in the buffer that `extra` names.
const void* parameter_of(void** parameters, void** extra) {
  if (parameters) return parameters[0];
  for (std::size_t i = 0; extra && extra[i] && i < 8; i += 2)
    if (reinterpret_cast<std::uintptr_t>(extra[i]) == 1) return extra[i + 1];  // BUFFER_POINTER
  return nullptr;
}

// Returns the error of a kernel with these parameters. A kernel whose ranges overlap has undefined
// results, but no error.
CUresult death_of(Misuse misuse) {
  switch (misuse) {
    case Misuse::none:
    case Misuse::overlap: return CUDA_SUCCESS;
    case Misuse::misaligned_digests:
    case Misuse::misaligned_scales: return CUDA_ERROR_MISALIGNED_ADDRESS;
    default: return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
}

}  // namespace

CUresult cuModuleLoadData(CUmodule* out, const void* image) {
  Call call(Function::cuModuleLoadData, Need::work);
  return call ? load(call, out, image) : call.status;
}

CUresult cuModuleLoadDataEx(CUmodule* out, const void* image, unsigned count, int* options,
                            void** values) {
  Call call(Function::cuModuleLoadDataEx, Need::work);
  if (!call) return call.status;
  if (count > 0 && (!options || !values)) return CUDA_ERROR_INVALID_VALUE;
  return load(call, out, image);
}

CUresult cuModuleUnload(CUmodule handle) {
  Call call(Function::cuModuleUnload, Need::context);
  if (!call) return call.status;
  if (const CUresult refused = unsafe_call(call); refused != CUDA_SUCCESS) return refused;
  if (!call.sim->modules.take(handle)) return CUDA_ERROR_INVALID_HANDLE;
  call.sim->kernels.erase_if([&](const Kernel& kernel) { return kernel.module == handle; });
  return call.context->sticky;
}

CUresult cuModuleGetFunction(CUfunction* out, CUmodule handle, const char* name) {
  Call call(Function::cuModuleGetFunction, Need::work);
  if (!call) return call.status;
  if (!out || !name) return CUDA_ERROR_INVALID_VALUE;
  const Module* const module = call.sim->modules.find(handle);
  if (!module) return CUDA_ERROR_INVALID_HANDLE;
  if (!is_kernel(name)) return CUDA_ERROR_NOT_FOUND;
  *out = call.sim->kernels.add(std::make_shared<Kernel>(Kernel{handle, module->context, name}));
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, int attribute, CUfunction handle) {
  Call call(Function::cuFuncGetAttribute, Need::work);
  if (!call) return call.status;
  if (!value || attribute < 0 || attribute > 15) return CUDA_ERROR_INVALID_VALUE;
  if (!call.sim->kernels.find(handle)) return CUDA_ERROR_INVALID_HANDLE;
  switch (attribute) {
    case 0: *value = 1024; break;  // threads per block
    case 4: *value = 32; break;    // registers
    case 5:
    case 6: *value = call.sim->options.capability; break;  // PTX, binary
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        CUstream stream_handle, void** parameters, void** extra) {
  Call call(Function::cuLaunchKernel, Need::work);
  if (!call) return call.status;
  const Kernel* const kernel = call.sim->kernels.find(handle);
  Stream* const stream = kernel ? call.stream(stream_handle) : nullptr;
  if (!kernel || (!stream && call.status == CUDA_SUCCESS)) return CUDA_ERROR_INVALID_HANDLE;
  if (!stream) return call.status;
  if (kernel->context != stream->context) return CUDA_ERROR_INVALID_HANDLE;
  const std::uint64_t threads = std::uint64_t{block_x} * block_y * block_z;
  if (grid_x == 0 || grid_y == 0 || grid_z == 0 || threads == 0 || grid_x > 0x7fffffff ||
      grid_y > 65535 || grid_z > 65535 || block_x > 1024 || block_y > 1024 || block_z > 64 ||
      threads > 1024 || shared_bytes > 227 * 1024 || (parameters && extra))
    return CUDA_ERROR_INVALID_VALUE;
  const void* const parameter = parameter_of(parameters, extra);
  Launch launch;
  if (!parameter || !parse_kernel(kernel->symbol.c_str(), parameter, &launch.call))
    return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult refused = legacy_use(call, *stream); refused != CUDA_SUCCESS) return refused;
  // The launch call succeeds; the kernel fails when it runs.
  const Misuse wrong = misuse(launch.call);
  if (wrong != Misuse::none)
    call.sim->detector.violation("misuse", kernel->symbol + ": " + text_of(wrong), call.number);
  launch.broken = death_of(wrong);
  if (stream->capture) return add_node(*stream, launch);
  return call.sim->enqueue(*stream, std::move(launch), call.origin());
}

}  // namespace warmserve::simcuda
