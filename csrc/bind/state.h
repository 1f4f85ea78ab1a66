// Python bindings of a runtime's state, which snapshots are made of.
#pragma once

#include <pybind11/pybind11.h>

namespace warmserve {

void bind_state(pybind11::module_& m);

}  // namespace warmserve
