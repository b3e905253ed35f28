// A program that runs one launch in memory of its own, every buffer of exactly its size, for AddressSanitizer. Standard
// input is the case, standard output the result: all numbers are u64.
//
// Case: bytes of the kernel's name, name; grid x, y, z; block x, y, z; dynamic shared bytes; seed; number of buffers,
// each: bytes, address modulo 256, content; number of arguments, each two: buffer and offset of a pointer, or ~0 and
// bits; number of links, each four: buffer and offset of a word that becomes a pointer, buffer and offset that it
// points to. Result: bytes of the fault's message, message; contents of all buffers, links as they were.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "launch.hpp"

namespace {

uint64_t read_u64() {
  uint64_t value = 0;
  if (std::fread(&value, sizeof(value), 1, stdin) != 1) std::abort();
  return value;
}
void read_bytes(char* to, size_t bytes) {
  if (bytes != 0 && std::fread(to, 1, bytes, stdin) != bytes) std::abort();
}

struct Buffer {
  size_t bytes = 0;
  char* begin = nullptr;
};

int run_case() {
  std::string name(read_u64(), '\0');
  read_bytes(name.data(), name.size());
  unsigned sizes[6];
  for (unsigned& size : sizes) size = static_cast<unsigned>(read_u64());
  const size_t dynamic_bytes = read_u64();
  const unsigned seed = static_cast<unsigned>(read_u64());
  std::vector<Buffer> buffers(read_u64());
  for (Buffer& b : buffers) {
    b.bytes = read_u64();
    const size_t before = read_u64();
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, before + b.bytes) != 0) std::abort();
    b.begin = static_cast<char*>(memory) + before;
    read_bytes(b.begin, b.bytes);
  }
  std::vector<uint64_t> values(read_u64());
  for (uint64_t& value : values) {
    const uint64_t buffer = read_u64(), offset = read_u64();
    value = buffer == ~uint64_t{0} ? offset : reinterpret_cast<uint64_t>(buffers.at(buffer).begin) + offset;
  }
  std::vector<uint64_t*> links(read_u64());
  std::vector<uint64_t> before;
  for (uint64_t*& link : links) {
    const uint64_t at = read_u64(), place = read_u64(), buffer = read_u64(), offset = read_u64();
    link = reinterpret_cast<uint64_t*>(buffers.at(at).begin + place);
    before.push_back(*link);
    *link = reinterpret_cast<uint64_t>(buffers.at(buffer).begin) + offset;
  }
  std::vector<void*> arguments;
  for (uint64_t& value : values) arguments.push_back(&value);
  char message[4000];
  shim_launch(name.c_str(), sizes, sizes + 3, dynamic_bytes, arguments.data(), seed, 1, message, sizeof(message));
  for (size_t i = 0; i < links.size(); ++i) *links[i] = before[i];
  const uint64_t length = std::strlen(message);
  std::fwrite(&length, sizeof(length), 1, stdout);
  std::fwrite(message, 1, length, stdout);
  for (const Buffer& b : buffers) std::fwrite(b.begin, 1, b.bytes, stdout);
  return std::fflush(stdout);
}

}  // namespace

int main() { return run_case(); }
