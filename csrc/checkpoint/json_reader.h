// A strict reader of JSON text (RFC 8259). It reads one value at a time, without recursion.
//
// It is as strict as the strictest readers: it refuses text that is not UTF-8, half a surrogate
// pair, control characters in strings, numbers beyond the range of a double, and values nested
// deeper than kMaxDepth.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"

namespace warmserve {

class JsonReader {
 public:
  static constexpr unsigned kMaxDepth = 127;            // nested containers
  static constexpr std::size_t kMaxNumberBytes = 4300;  // length of a number's text

  // Keeps a view of the text. Throws invalid_argument unless the whole text is UTF-8.
  explicit JsonReader(std::string_view text);

  // Returns the next byte that is not white space; 0 at the end of the text.
  char peek() noexcept;
  // Consumes that byte if it is `wanted`, and returns whether it did.
  bool take(char wanted) noexcept;
  // Consumes that byte. Throws unless it is `wanted`; `what` names the wanted byte in the message.
  void expect(char wanted, const char* what);
  // Throws unless only white space is left.
  void expect_end();

  // Reads a string and appends it, decoded, to `out`.
  void string(std::string& out);
  // Reads a number and returns its text.
  std::string_view number();
  // Reads and discards a value that is nested in `depth` containers.
  void skip(unsigned depth);

  std::size_t position() const noexcept { return at_; }
  std::string_view text_from(std::size_t begin) const noexcept {
    return text_.substr(begin, at_ - begin);
  }

 private:
  [[noreturn]] void fail(const std::string& why) const;
  std::uint32_t hex4();
  void escape(std::string& out);
  void word(std::string_view name);
  void key();

  std::string_view text_;
  std::size_t at_ = 0;
  std::string scratch_;
};

// Returns the text in quotation marks for a message: at most its first 100 bytes, made printable.
std::string quoted(std::string_view text);

}  // namespace warmserve
