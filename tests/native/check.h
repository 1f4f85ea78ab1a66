// A minimal test framework. A failed CHECK prints its place and ends the program.
#pragma once

#include <string>

#include "base/error.h"

namespace check {

// Returns the path of the simulated driver to make devices of (`--simcuda PATH`), or null.
const char* simulator();

// Returns whether random and repeated tests run at full length (`--thorough`).
bool thorough();

[[noreturn]] void fail(const char* file, int line, const std::string& what);

// A test. main() runs the tests in the order of the file; the command line can select tests by
// name.
struct Test {
  Test(const char* name, void (*body)());
};

}  // namespace check

#define TEST(name)                                   \
  static void name();                                \
  static const check::Test test_##name(#name, name); \
  static void name()

#define CHECK(...) ((__VA_ARGS__) ? void() : check::fail(__FILE__, __LINE__, #__VA_ARGS__))

// Checks that the statement throws a warmserve::Error of this kind.
#define CHECK_THROWS(expected, ...)                                                           \
  do {                                                                                        \
    bool threw = false;                                                                       \
    try {                                                                                     \
      __VA_ARGS__;                                                                            \
    } catch (const warmserve::Error& error) {                                                 \
      threw = true;                                                                           \
      if (error.kind() != warmserve::ErrorKind::expected)                                     \
        check::fail(__FILE__, __LINE__, std::string(#__VA_ARGS__ " threw: ") + error.what()); \
    }                                                                                         \
    if (!threw) check::fail(__FILE__, __LINE__, #__VA_ARGS__ " did not throw");               \
  } while (false)
