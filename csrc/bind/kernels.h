// Python bindings of the weight kernels on host buffers.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "kernels/kernels.h"

namespace warmserve {

// Returns the cast with this Python name. Throws invalid_argument for an unknown name.
CastKind cast_kind(const std::string& name);
const char* cast_name(CastKind kind);

void bind_kernels(pybind11::module_& m);

}  // namespace warmserve
