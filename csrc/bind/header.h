// Python bindings of checkpoint headers and model layouts, as tables that Python reads row by row.
#pragma once

#include <pybind11/pybind11.h>

namespace warmserve {

void bind_headers(pybind11::module_& m);

}  // namespace warmserve
