#include "simcuda/functions.h"

#include <cstring>

namespace warmserve::simcuda {
namespace {

struct Names {
  const char *symbol, *base;
};
constexpr Names kNames[] = {
#define X(name, base, since, parameters) {#name, #base},
    WARMSERVE_SIMCUDA_FUNCTIONS(X)
#undef X
};

}  // namespace

const char* name_of(Function function) noexcept {
  return kNames[static_cast<std::size_t>(function)].symbol;
}

std::size_t function_index(const char* name) noexcept {
  for (std::size_t i = 0; i < kFunctions; ++i)
    if (std::strcmp(name, kNames[i].symbol) == 0) return i;
  for (std::size_t i = 0; i < kFunctions; ++i)
    if (std::strcmp(name, kNames[i].base) == 0) return i;
  return kFunctions;
}

std::vector<Function> functions_named(const char* name) {
  std::vector<Function> found;
  for (std::size_t i = 0; i < kFunctions; ++i)
    if (std::strcmp(name, kNames[i].base) == 0) found.push_back(static_cast<Function>(i));
  const std::size_t exact = function_index(name);
  if (found.empty() && exact != kFunctions) found.push_back(static_cast<Function>(exact));
  return found;
}

}  // namespace warmserve::simcuda
