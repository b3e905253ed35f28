// Copies from device to shared memory that run beside the code (PTX ISA: cp.async; sm_80 and later). A thread's copies
// since its last commit are a group; groups end in their order. Other threads see what was copied after the thread has
// waited for its group and a barrier.
#pragma once
#include "portable.cuh"

#ifndef BITFORBIT_CUDA_SHIM

// 16 bytes; both addresses are aligned to them. Data goes through L2 alone.
__device__ __forceinline__ void copy_async(void* smem, const void* gmem) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(smem))),
               "l"(__cvta_generic_to_global(gmem))
               : "memory");
}

// The same, or 16 zeros: then nothing is read.
__device__ __forceinline__ void copy_async_or_zeros(void* smem, const void* gmem, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(smem))),
               "l"(__cvta_generic_to_global(gmem)), "r"(copy ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last kGroups groups are on their way.
template <u32 kGroups>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

#endif
