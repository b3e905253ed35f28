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

// --- bulk copies (PTX ISA: cp.async.bulk, mbarrier; sm_90 and later) -------------------------------------------------
// One thread copies a piece of any size; a barrier in shared memory counts the bytes that have come. Its phases end one
// after the other, each when one arrival has announced bytes and all of them are there.

// By one thread. Others use the barrier after a barrier of the warp or block.
__device__ __forceinline__ void init_barrier(u64* smem_barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(smem_barrier)))
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Announces bytes of the current phase, before they are copied.
__device__ __forceinline__ void expect_bytes(u64* smem_barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   static_cast<u32>(__cvta_generic_to_shared(smem_barrier))),
               "r"(bytes)
               : "memory");
}

// A multiple of 16 bytes; both addresses are aligned to them.
__device__ __forceinline__ void copy_bulk(void* smem, const void* gmem, u32 bytes, u64* smem_barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   static_cast<u32>(__cvta_generic_to_shared(smem))),
               "l"(__cvta_generic_to_global(gmem)), "r"(bytes),
               "r"(static_cast<u32>(__cvta_generic_to_shared(smem_barrier)))
               : "memory");
}

// Waits for the end of a phase: 0 for the first one, then 1, 0, 1, ... What was copied is there for the calling thread.
__device__ __forceinline__ void await_phase(u64* smem_barrier, u32 phase) {
  u32 ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(static_cast<u32>(__cvta_generic_to_shared(smem_barrier))), "r"(phase)
        : "memory");
  } while (ended == 0);
}

#endif
