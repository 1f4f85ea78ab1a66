// A strict reader of JSON text (RFC 8259), one value at a time and without recursion.
//
// It refuses what the strictest readers refuse: text that is not UTF-8, half of a surrogate pair,
// control characters in strings, numbers outside of a double, values nested deeper than kMaxDepth.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"

namespace warmserve {

class JsonReader {
 public:
  static constexpr unsigned kMaxDepth = 127;            // containers in each other
  static constexpr std::size_t kMaxNumberBytes = 4300;  // of the text of one number

  // Keeps a view of the text. Throws invalid_argument unless all of it is UTF-8.
  explicit JsonReader(std::string_view text);

  // The next byte that is not white space; 0 at the end of the text.
  char peek() noexcept;
  // Takes that byte if it is `wanted`.
  bool take(char wanted) noexcept;
  // Throws unless that byte is `wanted`; `what` names it in the message.
  void expect(char wanted, const char* what);
  // Throws unless nothing but white space is left.
  void expect_end();

  // Reads a string and appends it, decoded, to `out`.
  void string(std::string& out);
  // Reads a number and returns its text.
  std::string_view number();
  // Reads any value and forgets it; it stands in `depth` containers.
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

// The text between quotation marks as a message shows it: at most 100 bytes of it, printable.
std::string quoted(std::string_view text);

}  // namespace warmserve
