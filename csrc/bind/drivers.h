// Python bindings of drivers, of the wrappers that check them or make them fail, and of a
// benchmark.
#pragma once

#include <pybind11/pybind11.h>

namespace warmserve {

void bind_drivers(pybind11::module_& m);

}  // namespace warmserve
