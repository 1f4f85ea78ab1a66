// Reads and checks the headers of safetensors files into compact tables, independent of Python.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/name_table.h"

namespace warmserve {

// An element type of the format; `bits` is the size of one element.
struct ElementType {
  std::string_view name;
  std::uint32_t bits;
};
std::span<const ElementType> element_types() noexcept;

// String values by unique name.
struct StringTable {
  NameTable names;
  StringList values;
};

struct Tensor {
  std::uint64_t offset = 0, bytes = 0;  // in its file
  std::uint64_t first_dim = 0;          // index into TensorTable::dims
  std::uint32_t file = 0;
  std::uint8_t type = 0;  // index into element_types()
  std::uint8_t rank = 0;
};

// The tensors of the files, in the order of reading. A tensor has the number of its name.
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

// Longer names are refused, because Python holds the GIL while it makes a string of a name.
inline constexpr std::size_t kMaxNameBytes = 4 << 20;

// Reads the header of the next file and returns its __metadata__. The file's tensors occupy its
// bytes [start, size). Throws invalid_argument, which says what is wrong, if the header is
// inconsistent; the table is then unusable. If an earlier file has the same name, sets `other` to
// that file's number.
StringTable read_header(TensorTable& table, std::string_view text, std::uint64_t start,
                        std::uint64_t size, std::uint32_t& other);

// Returns the member `key` of a JSON object if it is an object of strings, else nullopt. Throws
// invalid_argument if the text is not a JSON object, or if the member has more than `most` members.
std::optional<StringTable> read_strings_of(std::string_view text, std::string_view key,
                                           std::uint32_t most);

}  // namespace warmserve
