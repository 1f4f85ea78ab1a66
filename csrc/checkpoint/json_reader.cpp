#include "checkpoint/json_reader.h"

#include <algorithm>
#include <charconv>
#include <cstring>

namespace warmserve {
namespace {

Error refused(const std::string& why) { return Error(ErrorKind::invalid_argument, why); }

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Returns the length of the UTF-8 sequence at `at`; 0 if the bytes are invalid.
std::size_t sequence(const unsigned char* at, std::size_t left) {
  const auto follows = [&](std::size_t i) { return (at[i] & 0xc0) == 0x80; };
  const unsigned char lead = at[0];
  if (lead < 0x80) return 1;
  if (lead >= 0xc2 && lead < 0xe0) return left >= 2 && follows(1) ? 2 : 0;
  if (lead >= 0xe0 && lead < 0xf0) {
    if (left < 3 || !follows(1) || !follows(2)) return 0;
    if (lead == 0xe0 && at[1] < 0xa0) return 0;   // overlong
    if (lead == 0xed && at[1] >= 0xa0) return 0;  // a surrogate
    return 3;
  }
  if (lead >= 0xf0 && lead < 0xf5) {
    if (left < 4 || !follows(1) || !follows(2) || !follows(3)) return 0;
    if (lead == 0xf0 && at[1] < 0x90) return 0;   // overlong
    if (lead == 0xf4 && at[1] >= 0x90) return 0;  // over U+10FFFF
    return 4;
  }
  return 0;
}

// Returns the position of the first byte that is not UTF-8, or the text's size.
std::size_t valid_utf8(std::string_view text) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
  std::size_t at = 0;
  while (at < text.size()) {
    std::uint64_t word = 0;
    while (at + sizeof word <= text.size()) {
      std::memcpy(&word, bytes + at, sizeof word);
      if (word & 0x8080808080808080) break;
      at += sizeof word;
    }
    if (at == text.size()) break;
    const std::size_t length = sequence(bytes + at, text.size() - at);
    if (length == 0) return at;
    at += length;
  }
  return at;
}

// Returns whether a number outside the range of a double is too large rather than too small.
bool is_above_one(std::string_view text) {
  const std::size_t e = std::min(text.find_first_of("eE"), text.size());
  const std::size_t point = std::min(text.find('.'), e);
  const std::size_t first = text.find_first_of("123456789");
  std::int64_t exponent = 0;
  for (std::size_t i = e + 1; i < text.size(); ++i)
    if (is_digit(text[i]))
      exponent = std::min<std::int64_t>(exponent * 10 + text[i] - '0', 1 << 20);
  if (e + 1 < text.size() && text[e + 1] == '-') exponent = -exponent;
  return static_cast<std::int64_t>(point) - static_cast<std::int64_t>(first) + exponent > 0;
}

void append_utf8(std::string& out, std::uint32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xc0 | (code >> 6));
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0 | (code >> 12));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | (code >> 18));
    out += static_cast<char>(0x80 | ((code >> 12) & 0x3f));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  }
}

}  // namespace

std::string quoted(std::string_view text) {
  static constexpr std::size_t kMost = 100;
  std::size_t shown = std::min(text.size(), kMost);
  while (shown < text.size() && shown > 0 && (text[shown] & 0xc0) == 0x80) --shown;
  std::string out = "'";
  for (const char c : text.substr(0, shown)) {
    static constexpr char kHex[] = "0123456789abcdef";
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      out += "\\x";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    } else {
      if (c == '\'' || c == '\\') out += '\\';
      out += c;
    }
  }
  return out + (shown < text.size() ? "'..." : "'");
}

JsonReader::JsonReader(std::string_view text) : text_(text) {
  if (const std::size_t valid = valid_utf8(text); valid != text.size())
    throw refused("not UTF-8: an invalid byte at byte " + std::to_string(valid));
}

void JsonReader::fail(const std::string& why) const {
  throw refused("not JSON: " + why + " at byte " + std::to_string(at_));
}

char JsonReader::peek() noexcept {
  while (at_ < text_.size()) {
    const char c = text_[at_];
    if (c != ' ' && c != '\n' && c != '\r' && c != '\t') return c;
    ++at_;
  }
  return 0;
}

bool JsonReader::take(char wanted) noexcept {
  if (peek() != wanted || at_ == text_.size()) return false;
  ++at_;
  return true;
}

void JsonReader::expect(char wanted, const char* what) {
  if (!take(wanted)) fail(std::string(what) + " is missing");
}

void JsonReader::expect_end() {
  peek();
  if (at_ != text_.size()) fail("bytes after its end");
}

std::uint32_t JsonReader::hex4() {
  std::uint32_t value = 0;
  for (int i = 0; i < 4; ++i, ++at_) {
    const char c = at_ < text_.size() ? text_[at_] : ' ';
    std::uint32_t digit = 0;
    if (is_digit(c)) {
      digit = static_cast<std::uint32_t>(c - '0');
    } else if (c >= 'a' && c <= 'f') {
      digit = static_cast<std::uint32_t>(c - 'a' + 10);
    } else if (c >= 'A' && c <= 'F') {
      digit = static_cast<std::uint32_t>(c - 'A' + 10);
    } else {
      fail("\\u without four hexadecimal digits");
    }
    value = value * 16 + digit;
  }
  return value;
}

// Reads the part of an escape that follows the backslash.
void JsonReader::escape(std::string& out) {
  static constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
  const char kind = at_ < text_.size() ? text_[at_] : 0;
  ++at_;
  if (kind != 'u') {
    const std::size_t found = kind ? kFrom.find(kind) : std::string_view::npos;
    if (found == std::string_view::npos) {
      --at_;
      fail("an unknown escape");
    }
    out += kTo[found];
    return;
  }
  const std::size_t begin = at_ - 2;
  std::uint32_t code = hex4();
  if (code >= 0xd800 && code < 0xe000) {
    std::uint32_t low = 0;
    if (code < 0xdc00 && text_.substr(at_, 2) == "\\u") {
      at_ += 2;
      low = hex4();
    }
    if (low < 0xdc00 || low >= 0xe000)
      throw refused("not UTF-8: half of a pair of surrogates (" +
                    std::string(text_.substr(begin, 6)) + ") at byte " + std::to_string(begin));
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }
  append_utf8(out, code);
}

void JsonReader::string(std::string& out) {
  if (!take('"')) fail("a string is missing");
  while (true) {
    const std::size_t begin = at_;
    while (at_ < text_.size() && text_[at_] != '"' && text_[at_] != '\\' &&
           static_cast<unsigned char>(text_[at_]) >= 0x20)
      ++at_;
    out.append(text_, begin, at_ - begin);
    if (at_ == text_.size()) fail("an unterminated string");
    const char c = text_[at_];
    if (c != '"' && c != '\\') fail("a control character in a string");
    ++at_;
    if (c == '"') return;
    escape(out);
  }
}

std::string_view JsonReader::number() {
  peek();
  const std::size_t begin = at_;
  const auto digits = [&] {
    const std::size_t first = at_;
    while (at_ < text_.size() && is_digit(text_[at_])) ++at_;
    if (at_ == first) fail("a digit is missing");
  };
  const auto here = [&](char c) { return at_ < text_.size() && text_[at_] == c; };
  if (here('-')) ++at_;
  if (here('0'))
    ++at_;
  else
    digits();
  if (at_ < text_.size() && is_digit(text_[at_])) fail("a number that begins with 0");
  bool is_integer = true;
  if (here('.')) {
    ++at_;
    digits();
    is_integer = false;
  }
  if (here('e') || here('E')) {
    ++at_;
    if (here('+') || here('-')) ++at_;
    digits();
    is_integer = false;
  }
  const std::string_view text = text_from(begin);
  if (text.size() > kMaxNumberBytes)
    fail("a number of " + std::to_string(text.size()) + " digits (at most " +
         std::to_string(kMaxNumberBytes) + " are accepted)");
  if (!is_integer || text.size() > 300) {
    double value = 0;
    const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value);
    if (parsed.ec == std::errc::result_out_of_range && is_above_one(text))
      fail("a number out of range");
  }
  return text;
}

void JsonReader::word(std::string_view name) {
  if (text_.substr(at_, name.size()) != name) fail("a value is missing");
  at_ += name.size();
}

void JsonReader::key() {
  scratch_.clear();
  string(scratch_);
  expect(':', "':'");
}

void JsonReader::skip(unsigned depth) {
  const unsigned outside = depth;
  bool closes[kMaxDepth + 1];  // whether the container at a depth is an object
  while (true) {
    const char c = peek();
    bool opened = false;
    if (c == '{' || c == '[') {
      ++at_;
      if (++depth > kMaxDepth)
        fail("values nested deeper than " + std::to_string(kMaxDepth) + " levels");
      closes[depth] = c == '{';
      opened = true;
    } else if (c == '"') {
      scratch_.clear();
      string(scratch_);
    } else if (c == '-' || is_digit(c)) {
      number();
    } else {
      word(c == 't' ? "true" : c == 'f' ? "false" : "null");
    }
    // Consumes closing brackets, then a comma, and in an object the next key.
    while (depth > outside) {
      const bool is_object = closes[depth];
      if (take(is_object ? '}' : ']')) {
        --depth;
        opened = false;
        continue;
      }
      if (!opened) expect(',', "',' or the end of a container");
      if (is_object) key();
      break;
    }
    if (depth == outside) return;
  }
}

}  // namespace warmserve
