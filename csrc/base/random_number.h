// Random numbers of the system, for names that must be unique.
#pragma once

#include <cstdint>

namespace warmserve {

// Returns a number other than 0. Throws general.
std::uint64_t random_number();

}  // namespace warmserve
