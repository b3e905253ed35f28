#include "bindings/module.hpp"

void bind_df11(nb::module_&) {}
