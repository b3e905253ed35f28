// Instruction sets: which there are, which this CPU has, which one is used.
#pragma once

#include <string_view>
#include <vector>

#include "planes_block.hpp"

namespace bitforbit {

struct Implementation {
  std::string_view name;
  const PlanesOps* planes;  // several levels may share them
  bool supported;           // by this CPU and its operating system
};

// All implementations compiled in, best last. CPUID is asked once.
const std::vector<Implementation>& implementations();

// The implementation of that name, or nullptr if there is none or this CPU cannot run it.
const Implementation* find_implementation(std::string_view name);

}  // namespace bitforbit
