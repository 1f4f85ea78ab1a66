// Headers of checkpoints and layouts of models: tables that Python asks row by row.
#pragma once

#include <pybind11/pybind11.h>

namespace warmserve {

void bind_headers(pybind11::module_& m);

}  // namespace warmserve
