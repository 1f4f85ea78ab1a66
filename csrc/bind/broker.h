// Python's classes of a broker and of a client's connection to it.
#pragma once

#include <pybind11/pybind11.h>

namespace warmserve {

void bind_broker(pybind11::module_& m);

}  // namespace warmserve
