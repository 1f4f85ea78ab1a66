#include "checkpoint/layout.h"

#include <limits>

#include "checkpoint/json_reader.h"

namespace warmserve {
namespace {

constexpr std::uint64_t kMost = std::numeric_limits<std::int64_t>::max();

std::optional<CastKind> cast_between(std::string_view from, std::string_view to) {
  struct Cast {
    std::string_view from, to;
    CastKind kind;
  };
  static constexpr Cast kCasts[] = {
      {"F32", "BF16", CastKind::f32_to_bf16}, {"F32", "F16", CastKind::f32_to_f16},
      {"F16", "F32", CastKind::f16_to_f32},   {"F16", "BF16", CastKind::f16_to_bf16},
      {"BF16", "F32", CastKind::bf16_to_f32}, {"BF16", "F16", CastKind::bf16_to_f16}};
  for (const Cast& cast : kCasts)
    if (cast.from == from && cast.to == to) return cast.kind;
  return std::nullopt;
}

// Sorts the tensors into layers by counting, which keeps the file order within each layer.
void distribute(Layout& layout, std::size_t groups, std::span<const std::uint32_t> group_of) {
  const TensorTable& table = *layout.table;
  std::vector<std::uint64_t> counts(groups);
  for (const std::uint32_t group : group_of) ++counts[group];
  std::vector<std::uint64_t> next(groups);
  for (std::size_t group = 0; group < groups; ++group) {
    next[group] = layout.first_member.empty() ? 0 : layout.first_member.back();
    if (layout.first_member.empty()) layout.first_member.push_back(0);
    if (counts[group]) layout.first_member.push_back(next[group] + counts[group]);
  }
  if (layout.first_member.empty()) layout.first_member.push_back(0);
  layout.members.resize(table.order.size());
  for (const std::uint32_t number : table.order) layout.members[next[group_of[number]]++] = number;
}

class Filler {
 public:
  explicit Filler(Layout& layout) : layout_(layout) {}

  std::uint64_t fill(std::size_t layer) {
    end_ = 0;
    file_ = std::numeric_limits<std::uint32_t>::max();
    for (const std::uint32_t number : layout_.members_of(layer)) add(number, layer);
    return end_;
  }

 private:
  void add(std::uint32_t number, std::size_t layer) {
    const Tensor& tensor = layout_.table->tensors[number];
    const ElementType from = element_types()[tensor.type],
                      to = element_types()[layout_.types[number]];
    std::optional<CastKind> cast;
    Layout::Place& place = layout_.places[number];
    place.layer = static_cast<std::uint32_t>(layer);
    if (!tensor.bytes) return;
    place.bytes = tensor.bytes;
    if (from.name != to.name) {
      cast = cast_between(from.name, to.name);
      if (!cast)
        throw Error(ErrorKind::invalid_argument, "tensor " + quoted(layout_.table->names[number]) +
                                                     " is " + std::string(from.name) +
                                                     ", for which there is no cast to " +
                                                     std::string(to.name));
      place.bytes = tensor.bytes / (from.bits / 8) * (to.bits / 8);
    }
    place.offset = (end_ + kTensorAlignment - 1) / kTensorAlignment * kTensorAlignment;
    if (place.offset > kMost - place.bytes)
      throw Error(ErrorKind::invalid_argument,
                  "the tensors of layer " +
                      quoted(layout_.names[static_cast<std::uint32_t>(layer)]) +
                      " take more than 2**63 - 1 bytes");
    const bool goes_on = file_ == tensor.file && file_end_ == tensor.offset &&
                         place.offset == end_ && layout_.segments.back().cast == cast;
    if (goes_on)
      layout_.segments.back().bytes += place.bytes;
    else
      layout_.segments.push_back({tensor.file, tensor.offset, place.offset, place.bytes, cast});
    file_ = tensor.file;
    file_end_ = tensor.offset + tensor.bytes;
    end_ = place.offset + place.bytes;
  }

  Layout& layout_;
  std::uint64_t end_ = 0, file_end_ = 0;
  std::uint32_t file_ = 0;
};

}  // namespace

Layout lay_out(std::shared_ptr<const TensorTable> table, const StringList& group_names,
               std::span<const std::uint32_t> group_of, std::vector<std::uint8_t> types) {
  Layout layout;
  layout.table = std::move(table);
  layout.types = std::move(types);
  const std::size_t count = layout.table->tensors.size();
  if (layout.types.empty()) {
    layout.types.reserve(count);
    for (const Tensor& tensor : layout.table->tensors) layout.types.push_back(tensor.type);
  }
  layout.places.resize(count);
  distribute(layout, group_names.size(), group_of);
  const std::size_t layers = layout.first_member.size() - 1;
  layout.bytes.reserve(layers);
  layout.first_segment.reserve(layers + 1);
  layout.first_segment.push_back(0);
  Filler filler(layout);
  for (std::size_t layer = 0; layer < layers; ++layer) {
    layout.names.add(group_names[group_of[layout.members_of(layer).front()]]);
    layout.bytes.push_back(filler.fill(layer));
    layout.first_segment.push_back(layout.segments.size());
    if (__builtin_add_overflow(layout.total, layout.bytes.back(), &layout.total) ||
        layout.total > kMost)
      throw Error(ErrorKind::invalid_argument, "the layers take more than 2**63 - 1 bytes");
  }
  return layout;
}

}  // namespace warmserve
