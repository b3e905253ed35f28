// A libcuda.so.1 for machines without NVIDIA's driver: the calls that bitforbit makes, written to $STANDIN_LOG. Two
// devices. A launch writes its parameters, taken to be one address and one 32-bit word. STANDIN_FAIL names a call that
// fails with the code STANDIN_CODE. Device memory is host memory.
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static __thread uintptr_t stack[8];
static __thread int depth;

static int call(const char* name, const char* format, ...) {
  FILE* log = fopen(getenv("STANDIN_LOG"), "a");
  if (log != NULL) {
    va_list rest;
    va_start(rest, format);
    fprintf(log, "%s ", name);
    vfprintf(log, format, rest);
    fputc('\n', log);
    va_end(rest);
    fclose(log);
  }
  const char* fail = getenv("STANDIN_FAIL");
  return fail != NULL && strcmp(fail, name) == 0 ? atoi(getenv("STANDIN_CODE")) : 0;
}

int cuInit(unsigned flags) { return call("cuInit", "%u", flags); }

int cuDriverGetVersion(int* version) {
  *version = 13020;
  return 0;
}

int cuDeviceGetCount(int* count) {
  *count = 2;
  return 0;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = 10 + ordinal;
  return 0;
}

int cuDeviceGetName(char* name, int length, int device) {
  snprintf(name, (size_t)length, "Stand-in %d", device);
  return 0;
}

// Bindings ask for this version of the call.
int cuDeviceTotalMem_v2(size_t* nbytes, int device) {
  *nbytes = (size_t)(70 + device) << 30;
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  // 75 and 76: compute capability; 16: multiprocessors; 38: bytes of L2; 97: shared memory per block, opted in to
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : attribute == 38 ? 1 << 25 : 232448;
  return call("cuDeviceGetAttribute", "%d %d", attribute, device);
}

int cuDevicePrimaryCtxRetain(uintptr_t* context, int device) {
  *context = 0x1000 + (uintptr_t)device;
  return 0;
}

int cuCtxGetCurrent(uintptr_t* context) {
  *context = depth > 0 ? stack[depth - 1] : 0;
  return 0;
}

int cuCtxPushCurrent_v2(uintptr_t context) {
  stack[depth++] = context;
  return call("cuCtxPushCurrent", "%lx", context);
}

int cuCtxPopCurrent_v2(uintptr_t* context) {
  *context = stack[--depth];
  return call("cuCtxPopCurrent", "%lx", *context);
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  static __thread int current = 0;
  int before = current;
  current = *mode;
  *mode = before;
  return call("cuThreadExchangeStreamCaptureMode", "%d", current);
}

int cuModuleLoadData(uintptr_t* module, const unsigned char* image) {
  *module = 0x2000;
  return call("cuModuleLoadData", "%02x%c%c%c", image[0], image[1], image[2], image[3]);
}

int cuModuleGetFunction(uintptr_t* function, uintptr_t module, const char* name) {
  *function = 0x3000;
  return call("cuModuleGetFunction", "%lx %s", module, name);
}

int cuFuncGetAttribute(int* value, int attribute, uintptr_t function) {
  *value = attribute == 1 ? 1024 : -1;  // 1: static shared memory
  return 0;
}

int cuFuncSetAttribute(uintptr_t function, int attribute, int value) {
  return call("cuFuncSetAttribute", "%lx %d %d", function, attribute, value);
}

int cuLaunchKernel(uintptr_t function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, uintptr_t stream, void** parameters,
                   void** extra) {
  return call("cuLaunchKernel", "%lx (%u %u %u) (%u %u %u) %u stream %lx parameters %lx %u extra %lx", function, grid_x,
              grid_y, grid_z, block_x, block_y, block_z, shared, stream, *(uint64_t*)parameters[0],
              *(uint32_t*)parameters[1], (uintptr_t)extra);
}

static int capture(uintptr_t stream, int* status, uint64_t* id) {
  *status = stream == 7;
  *id = 41;
  return 0;
}

int cuStreamGetCaptureInfo_v2(uintptr_t stream, int* status, uint64_t* id, void** graph, void** nodes, size_t* count) {
  *count = 0;
  return capture(stream, status, id);
}

int cuStreamGetCaptureInfo_v3(uintptr_t stream, int* status, uint64_t* id, void** graph, void** nodes, void** edges,
                              size_t* count) {
  *count = 0;
  return capture(stream, status, id);
}

int cuMemAlloc_v2(uintptr_t* address, size_t size) {
  *address = (uintptr_t)aligned_alloc(512, (size + 511) / 512 * 512);
  return 0;
}

int cuMemFree_v2(uintptr_t address) {
  free((void*)address);
  return 0;
}

int cuMemsetD8_v2(uintptr_t address, unsigned char value, size_t size) {
  memset((void*)address, value, size);
  return 0;
}

int cuMemcpyHtoD_v2(uintptr_t device, const void* host, size_t size) {
  memcpy((void*)device, host, size);
  return 0;
}

int cuMemcpyDtoH_v2(void* host, uintptr_t device, size_t size) {
  memcpy(host, (void*)device, size);
  return 0;
}

int cuStreamCreate(uintptr_t* stream, unsigned flags) {
  *stream = 0x50 + flags;
  return 0;
}

int cuStreamSynchronize(uintptr_t stream) { return call("cuStreamSynchronize", "%lx", stream); }

int cuStreamDestroy_v2(uintptr_t stream) { return call("cuStreamDestroy", "%lx", stream); }

int cuCtxSynchronize(void) { return 0; }
