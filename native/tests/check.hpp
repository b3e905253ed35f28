// A small test harness: TEST(name) { CHECK(...); }, run by main.cpp. A failed check ends its test, not the program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace bitforbit::testing {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Test {
  const char* name;
  void (*run)();
};

std::vector<Test>& tests();

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& message) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + message);
}

// Bytes on the heap in an allocation of exactly that size, so that AddressSanitizer sees every access past either end.
// `shift` moves the first byte off its alignment.
class ExactBytes {
 public:
  explicit ExactBytes(std::size_t size, std::size_t shift = 0)
      : bytes_(new std::uint8_t[size + shift]), size_(size), shift_(shift) {}
  explicit ExactBytes(std::span<const std::uint8_t> from, std::size_t shift = 0) : ExactBytes(from.size(), shift) {
    for (std::size_t i = 0; i < size_; ++i) data()[i] = from[i];
  }
  std::uint8_t* data() { return bytes_.get() + shift_; }
  const std::uint8_t* data() const { return bytes_.get() + shift_; }
  std::size_t size() const { return size_; }
  std::uint8_t& operator[](std::size_t i) { return data()[i]; }
  std::span<const std::uint8_t> span() const { return {data(), size_}; }

 private:
  std::unique_ptr<std::uint8_t[]> bytes_;
  std::size_t size_, shift_;
};

// Fails with the first differing byte.
inline void check_same_bytes(const char* file, int line, std::span<const std::uint8_t> expected,
                             std::span<const std::uint8_t> got, const std::string& what) {
  if (expected.size() != got.size()) {
    fail(file, line,
         what + ": expected " + std::to_string(expected.size()) + " bytes, got " + std::to_string(got.size()));
  }
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (expected[i] != got[i]) {
      fail(file, line,
           what + ": byte " + std::to_string(i) + " of " + std::to_string(got.size()) + ": expected " +
               std::to_string(expected[i]) + ", got " + std::to_string(got[i]));
    }
  }
}

// Random numbers that are the same on every machine (the distributions of the standard library are not).
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::uint64_t bits() { return engine_(); }
  std::size_t below(std::size_t n) { return static_cast<std::size_t>(engine_() % n); }

 private:
  std::mt19937_64 engine_;
};

}  // namespace bitforbit::testing

#define TEST(name)                                                                  \
  static void test_##name();                                                        \
  static const ::bitforbit::testing::Register register_##name{#name, &test_##name}; \
  static void test_##name()

#define CHECK(condition)                                                                       \
  do {                                                                                         \
    if (!(condition)) ::bitforbit::testing::fail(__FILE__, __LINE__, "not true: " #condition); \
  } while (false)

#define CHECK_SAME_BYTES(expected, got, what) \
  ::bitforbit::testing::check_same_bytes(__FILE__, __LINE__, (expected), (got), (what))

#define CHECK_THROWS(Error, ...)                                                                            \
  do {                                                                                                      \
    bool thrown = false;                                                                                    \
    try {                                                                                                   \
      __VA_ARGS__;                                                                                          \
    } catch (const Error&) {                                                                                \
      thrown = true;                                                                                        \
    }                                                                                                       \
    if (!thrown) ::bitforbit::testing::fail(__FILE__, __LINE__, "did not throw " #Error ": " #__VA_ARGS__); \
  } while (false)
