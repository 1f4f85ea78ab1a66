// The weight kernels on buffers of the host.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "kernels/kernels.h"

namespace warmserve {

// By the name that Python has for it. Throws invalid_argument for another.
CastKind cast_kind(const std::string& name);
const char* cast_name(CastKind kind);

void bind_kernels(pybind11::module_& m);

}  // namespace warmserve
