#include "checkpoint/safetensors_header.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <numeric>
#include <optional>

#include "checkpoint/json_reader.h"

namespace warmserve {
namespace {

constexpr ElementType kTypes[] = {
    {"F4", 4},          {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"BOOL", 8},    {"U8", 8},
    {"I8", 8},          {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"U16", 16},    {"I16", 16},    {"F16", 16},    {"BF16", 16},
    {"U32", 32},        {"I32", 32},    {"F32", 32},    {"U64", 64},    {"I64", 64},
    {"F64", 64},        {"C64", 64}};

constexpr std::uint64_t kMost = std::numeric_limits<std::int64_t>::max();
constexpr std::size_t kMaxRank = 64;  // no library takes 65 axes

Error refused(const std::string& why) { return Error(ErrorKind::invalid_argument, why); }

// Returns a value's text for a message, cut after 100 bytes.
std::string shown(std::string_view text) {
  if (text.size() <= 100) return std::string(text);
  std::size_t end = 100;
  while ((text[end] & 0xc0) == 0x80) --end;
  return std::string(text.substr(0, end)) + "...";
}

// The integers of a list, of which only the first kMaxRank + 1 are kept.
struct Numbers {
  std::size_t count = 0;  // the list's length
  std::array<std::int64_t, kMaxRank + 1> values;
  bool valid = false;  // whether it is a list of integers from 0 to 2**63 - 1
  std::string_view text;

  void read(JsonReader& reader) {
    reader.peek();
    const std::size_t begin = reader.position();
    count = 0;
    valid = read_list(reader);
    text = reader.text_from(begin);
  }

 private:
  bool read_list(JsonReader& reader) {
    if (reader.peek() != '[') {
      reader.skip(2);
      return false;
    }
    reader.take('[');
    if (reader.take(']')) return true;
    bool good = true;
    do {
      const char c = reader.peek();
      if (c == '-' || (c >= '0' && c <= '9')) {
        const std::string_view digits = reader.number();
        std::int64_t value = 0;
        const char* end = digits.data() + digits.size();
        const auto parsed = std::from_chars(digits.data(), end, value);
        // Refusing any minus refuses -0 too, which other readers take for a fraction.
        good = good && parsed.ec == std::errc() && parsed.ptr == end && c != '-';
        if (count < values.size()) values[count] = value;
      } else {
        reader.skip(3);
        good = false;
      }
      ++count;
    } while (reader.take(','));
    reader.expect(']', "']'");
    return good;
  }
};

// One tensor's entry, whose fields may be in any order.
class Entry {
 public:
  void read(JsonReader& reader, std::string_view name) {
    has_type_ = has_shape_ = has_offsets_ = false;
    if (reader.peek() != '{') {
      reader.skip(1);
      incomplete(name);
    }
    reader.take('{');
    if (reader.take('}')) incomplete(name);
    do {
      key_.clear();
      reader.string(key_);
      reader.expect(':', "':'");
      if (key_ == "dtype") {
        once(has_type_, name);
        reader.peek();
        const std::size_t begin = reader.position();
        type_.reset();
        type_text_.clear();
        if (reader.peek() == '"') {
          reader.string(type_text_);
          find_type();
        } else {
          reader.skip(2);
        }
        type_shown_ = reader.text_from(begin);
      } else if (key_ == "shape") {
        once(has_shape_, name);
        shape_.read(reader);
      } else if (key_ == "data_offsets") {
        once(has_offsets_, name);
        offsets_.read(reader);
      } else {
        reader.skip(2);  // a field of a later version of the format
      }
    } while (reader.take(','));
    reader.expect('}', "'}'");
    if (!has_type_ || !has_shape_ || !has_offsets_) incomplete(name);
  }

  // Appends the shape to `dims`.
  Tensor checked(std::string_view name, std::uint64_t start,
                 std::vector<std::int64_t>& dims) const {
    if (!type_) {
      const bool is_text = type_shown_.starts_with('"');
      throw refused(quoted(name) + " has the unknown dtype " +
                    (is_text ? quoted(type_text_) : shown(type_shown_)));
    }
    require_valid("shape", shape_, name);
    require_valid("data_offsets", offsets_, name);
    // Dims of 0 count as 1, so that the strides of empty tensors do not overflow either.
    std::uint64_t extent = kTypes[*type_].bits, bits = extent;
    bool fits = shape_.count <= kMaxRank;
    for (std::size_t i = 0; fits && i < shape_.count; ++i) {
      const auto dim = static_cast<std::uint64_t>(shape_.values[i]);
      fits = !__builtin_mul_overflow(extent, std::max<std::uint64_t>(dim, 1), &extent) &&
             extent <= kMost;
      bits *= dim;
    }
    if (!fits) throw refused("the shape of " + quoted(name) + " overflows: " + shown(shape_.text));
    const auto begin = static_cast<std::uint64_t>(offsets_.values[0]),
               end = static_cast<std::uint64_t>(offsets_.values[1]);
    if (offsets_.count != 2 || end < begin || bits % 8 || end - begin != bits / 8)
      throw refused("data_offsets of " + quoted(name) + ", " + shown(offsets_.text) +
                    ", do not span its " + std::to_string(bits) + " bits");
    Tensor tensor;
    tensor.offset = start + begin;  // both are below 2**63
    tensor.bytes = bits / 8;
    tensor.first_dim = dims.size();
    tensor.type = *type_;
    tensor.rank = static_cast<std::uint8_t>(shape_.count);
    dims.insert(dims.end(), shape_.values.begin(),
                shape_.values.begin() + static_cast<std::ptrdiff_t>(shape_.count));
    return tensor;
  }

 private:
  [[noreturn]] static void incomplete(std::string_view name) {
    throw refused(quoted(name) + " needs dtype, shape and data_offsets");
  }
  void once(bool& seen, std::string_view name) const {
    if (seen) throw refused("duplicate name " + quoted(key_) + " in " + quoted(name));
    seen = true;
  }
  void find_type() {
    for (std::size_t i = 0; i < std::size(kTypes); ++i)
      if (kTypes[i].name == type_text_) type_ = static_cast<std::uint8_t>(i);
  }
  static void require_valid(const char* what, const Numbers& numbers, std::string_view name) {
    if (!numbers.valid)
      throw refused(std::string(what) + " of " + quoted(name) +
                    " must be integers from 0 to 2**63 - 1, got " + shown(numbers.text));
  }

  bool has_type_ = false, has_shape_ = false, has_offsets_ = false;
  std::optional<std::uint8_t> type_;
  std::string key_, type_text_;
  std::string_view type_shown_;
  Numbers shape_, offsets_;
};

[[noreturn]] void refuse_long(std::string_view name) {
  throw refused("a name of " + std::to_string(name.size()) + " bytes, " + quoted(name) +
                ": at most " + std::to_string(kMaxNameBytes) + " are accepted");
}

// Reads an object's members into the table. Returns false at the first value that is not a string,
// before reading it.
bool read_strings(JsonReader& reader, StringTable& table, std::uint32_t most) {
  reader.expect('{', "'{'");
  if (reader.take('}')) return true;
  StringList names;
  do {
    reader.string(names.pending());
    const std::string_view name = names.pending_string();
    if (name.size() > kMaxNameBytes) refuse_long(name);
    if (names.size() >= most) throw refused("more than " + std::to_string(most) + " names");
    names.add_pending();
    reader.expect(':', "':'");
    if (reader.peek() != '"') return false;
    reader.string(table.values.pending());
    table.values.add_pending();
  } while (reader.take(','));
  reader.expect('}', "'}'");
  if (const auto twice = table.names.assign(std::move(names)))
    throw refused("duplicate name " + quoted(table.names[*twice]));
  return true;
}

void check_offsets(TensorTable& table, std::uint32_t first, std::uint64_t start,
                   std::uint64_t size) {
  const auto begin = table.order.begin() + first;
  const auto before = [&](std::uint32_t a, std::uint32_t b) {
    const Tensor &x = table.tensors[a], &y = table.tensors[b];
    return std::tie(x.offset, x.bytes, a) < std::tie(y.offset, y.bytes, b);
  };
  if (!std::is_sorted(begin, table.order.end(), before))
    std::sort(begin, table.order.end(), before);
  std::uint64_t end = start;
  for (auto at = begin; at != table.order.end(); ++at) {
    const Tensor& tensor = table.tensors[*at];
    if (tensor.offset != end)
      throw refused(quoted(table.names[*at]) + " at byte " + std::to_string(tensor.offset) +
                    (tensor.offset < end ? " overlaps the tensor" : " leaves a hole") +
                    " before it");
    end += tensor.bytes;  // below 2**64: it is start + data_offsets[1], both below 2**63
  }
  if (end != size)
    throw refused(std::string(end > size ? "truncated" : "bytes that belong to no tensor") +
                  ": tensors end at byte " + std::to_string(end) + ", the file at " +
                  std::to_string(size));
}

}  // namespace

std::span<const ElementType> element_types() noexcept { return kTypes; }

StringTable read_header(TensorTable& table, std::string_view text, std::uint64_t start,
                        std::uint64_t size, std::uint32_t& other) {
  static constexpr std::string_view kMetadata = "__metadata__";
  if (!text.starts_with('{'))
    throw refused("the header is not a JSON object: it does not begin with '{'");
  JsonReader reader(text);
  StringTable metadata;
  bool has_metadata = false;
  const std::uint32_t file = table.files++, first = table.names.size();
  Entry entry;
  reader.take('{');
  if (!reader.take('}')) {
    do {
      reader.string(table.names.pending());
      const std::string_view name = table.names.pending_name();
      if (name.size() > kMaxNameBytes) refuse_long(name);
      if (name == kMetadata) {
        table.names.drop_pending();
        if (has_metadata) throw refused("duplicate name " + quoted(kMetadata));
        has_metadata = true;
        reader.expect(':', "':'");
        if (reader.peek() == 'n')
          reader.skip(1);
        else if (reader.peek() != '{' ||
                 !read_strings(reader, metadata, std::numeric_limits<std::uint32_t>::max() - 1))
          throw refused("__metadata__ is not an object of strings");
        continue;
      }
      const auto [number, is_new] = table.names.add_pending();
      if (!is_new) {
        if (number >= first) throw refused("duplicate name " + quoted(table.names[number]));
        other = table.tensors[number].file;
        throw refused(quoted(table.names[number]) + " is also in");
      }
      reader.expect(':', "':'");
      entry.read(reader, table.names[number]);
      table.tensors.push_back(entry.checked(table.names[number], start, table.dims));
      table.tensors.back().file = file;
    } while (reader.take(','));
    reader.expect('}', "'}'");
  }
  reader.expect_end();
  table.order.resize(table.names.size());
  std::iota(table.order.begin() + first, table.order.end(), first);
  check_offsets(table, first, start, size);
  return metadata;
}

std::optional<StringTable> read_strings_of(std::string_view text, std::string_view key,
                                           std::uint32_t most) {
  JsonReader reader(text);
  std::optional<StringTable> found;
  NameTable names;
  if (reader.peek() != '{') {
    reader.skip(0);
    reader.expect_end();
    throw refused("not a JSON object");
  }
  reader.take('{');
  if (!reader.take('}')) {
    do {
      reader.string(names.pending());
      if (names.pending_name().size() > kMaxNameBytes) refuse_long(names.pending_name());
      const auto [number, is_new] = names.add_pending();
      if (!is_new) throw refused("duplicate name " + quoted(names[number]));
      reader.expect(':', "':'");
      if (reader.peek() == '{' && names[number] == key) {
        const JsonReader before = reader;
        found.emplace();
        if (read_strings(reader, *found, most)) continue;
        found.reset();
        reader = before;
      }
      reader.skip(1);
    } while (reader.take(','));
    reader.expect('}', "'}'");
  }
  reader.expect_end();
  return found;
}

}  // namespace warmserve
