// Runs every test whose name contains the first argument (all without one); the exit status is 1 if one fails.
#include <chrono>
#include <cstdio>
#include <exception>
#include <string_view>

#include "tests/check.hpp"

namespace bitforbit::testing {

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

}  // namespace bitforbit::testing

int main(int argc, char** argv) {
  const std::string_view filter = argc > 1 ? argv[1] : "";
  int ran = 0, failed = 0;
  for (const auto& test : bitforbit::testing::tests()) {
    if (std::string_view(test.name).find(filter) == std::string_view::npos) continue;
    const auto start = std::chrono::steady_clock::now();
    std::string error;
    try {
      test.run();
    } catch (const std::exception& e) {
      error = e.what();
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s %s (%.2f s)\n", error.empty() ? "ok  " : "FAIL", test.name, seconds.count());
    if (!error.empty()) std::printf("     %s\n", error.c_str());
    std::fflush(stdout);
    ++ran;
    failed += !error.empty();
  }
  std::printf("%d of %d native tests passed\n", ran - failed, ran);
  return failed || !ran ? 1 : 0;
}
