// The headers of safetensors files, read and checked, as compact tables; nothing here knows Python.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/name_table.h"

namespace warmserve {

// One of the format's element types; `bits` is the size of one element.
struct ElementType {
  std::string_view name;
  std::uint32_t bits;
};
std::span<const ElementType> element_types() noexcept;

// Strings by name, each name once.
struct StringTable {
  NameTable names;
  StringList values;
};

struct Tensor {
  std::uint64_t offset = 0, bytes = 0;  // in its file
  std::uint64_t first_dim = 0;          // of TensorTable::dims
  std::uint32_t file = 0;
  std::uint8_t type = 0;  // of element_types()
  std::uint8_t rank = 0;
};

// The tensors of one file after another. A tensor's number is its name's.
struct TensorTable {
  NameTable names;
  std::vector<Tensor> tensors;
  std::vector<std::int64_t> dims;
  std::vector<std::uint32_t> order;  // numbers, by file and then by offset
  std::uint32_t files = 0;

  std::span<const std::int64_t> shape(const Tensor& tensor) const noexcept {
    return std::span(dims).subspan(tensor.first_dim, tensor.rank);
  }
};

// Names longer than this are refused: Python holds its lock while it makes a string of one.
inline constexpr std::size_t kMaxNameBytes = 4 << 20;

// Reads the header of the next file, whose tensors' bytes are [start, size) of it, and returns its
// __metadata__. Throws invalid_argument, which says what is wrong, unless all of it is consistent:
// the table is of no use then. If a name is in an earlier file, `other` is that file's number.
StringTable read_header(TensorTable& table, std::string_view text, std::uint64_t start,
                        std::uint64_t size, std::uint32_t& other);

// A JSON object's member `key`, if that is an object of strings. Throws invalid_argument unless all
// of the text is JSON, or if the member has more than `most` members.
std::optional<StringTable> read_strings_of(std::string_view text, std::string_view key,
                                           std::uint32_t most);

}  // namespace warmserve
