#include "simcuda/work.h"

#include <algorithm>

namespace warmserve::simcuda {

void touches(const Work& work, std::vector<Touch>* out) {
  if (const auto* copy = std::get_if<Copy>(&work)) {
    if (copy->from_place != Place::pageable) out->push_back({copy->from, copy->bytes, false});
    if (copy->to_place != Place::pageable) out->push_back({copy->to, copy->bytes, true});
  } else if (const auto* fill = std::get_if<Fill>(&work)) {
    out->push_back({fill->to, fill->bytes, true});
  } else if (const auto* launch = std::get_if<Launch>(&work)) {
    if (launch->broken != CUDA_SUCCESS) return;
    const auto* gather = std::get_if<GatherCall>(&launch->call);
    for (const Touched& range : touched(launch->call)) {
      if (gather && !range.write && gather->pitch > gather->row_bytes) {
        for (std::uint64_t row = 0; row < gather->rows; ++row)
          out->push_back({gather->from + row * gather->pitch, gather->row_bytes, false});
      } else {
        out->push_back({range.address, range.bytes, range.write});
      }
    }
    std::stable_sort(out->begin(), out->end(),
                     [](const Touch& a, const Touch& b) { return a.write < b.write; });
  }
}

}  // namespace warmserve::simcuda
