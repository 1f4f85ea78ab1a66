// The weight kernels on buffers of the host.
#pragma once

#include <pybind11/pybind11.h>

namespace warmserve {

void bind_kernels(pybind11::module_& m);

}  // namespace warmserve
