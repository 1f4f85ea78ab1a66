// Devices as Python sees them: made, watched, made to fail, timed.
#pragma once

#include <pybind11/pybind11.h>

namespace warmserve {

void bind_drivers(pybind11::module_& m);

}  // namespace warmserve
