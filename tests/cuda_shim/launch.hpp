// What Python calls.
#pragma once

#include <cstddef>

#define SHIM_EXPORT __attribute__((visibility("default")))

extern "C" {
// Bytes of the parameters of a kernel into `bytes` (room for 64); returns their number, or -1 for an unknown kernel.
SHIM_EXPORT int shim_parameters(const char* name, size_t* bytes);
// Whether the flavour "races" reports reads of shared memory that was not written.
SHIM_EXPORT void shim_report_uninitialized(bool on);
// Whether mma_bf16 rounds after each addition.
SHIM_EXPORT void shim_mma_rounds_each(bool on);
// Runs a kernel to its end. Returns 0, or 1 with a message.
SHIM_EXPORT int shim_launch(const char* name, const unsigned* grid, const unsigned* block, size_t dynamic_bytes,
                            void** arguments, unsigned seed, unsigned os_threads, char* message, size_t message_bytes);
}
