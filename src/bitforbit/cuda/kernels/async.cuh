// Copies from global to shared memory that go on while the thread does other things (PTX ISA: cp.async, sm_80 and
// later; cp.async.bulk with an mbarrier, sm_90 and later).
#pragma once
#include "portable.cuh"

#ifndef BITFORBIT_CUDA_SHIM

__device__ __forceinline__ u32 shared_address(const void* smem) {
  return static_cast<u32>(__cvta_generic_to_shared(smem));
}

// --- cp.async: a thread's copies since its last commit are a group; groups end in their order. Other threads see what
// was copied after the thread has waited for its group and a barrier.
// --------------------------------------------------------

// 16 bytes; both addresses are aligned to them. Data goes through L2 alone.
__device__ __forceinline__ void copy_async(void* smem, const void* gmem) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(smem)),
               "l"(__cvta_generic_to_global(gmem))
               : "memory");
}

// The same, or 16 zeros: then nothing is read.
__device__ __forceinline__ void copy_async_or_zeros(void* smem, const void* gmem, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)),
               "l"(__cvta_generic_to_global(gmem)), "r"(copy ? 16 : 0)
               : "memory");
}

// 4 or 8 bytes, on their multiples, of which the first `valid` are read and the others become zeros.
template <u32 kBytes>
__device__ __forceinline__ void copy_async_part(void* smem, const void* gmem, u32 valid) {
  static_assert(kBytes == 4 || kBytes == 8);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(smem)),
               "l"(__cvta_generic_to_global(gmem)), "n"(kBytes), "r"(valid)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last kGroups groups are on their way.
template <u32 kGroups>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

#if __CUDA_ARCH__ >= 900

// --- mbarrier: 8 bytes of shared memory, on 8 bytes. A phase is complete when `count` arrivals have come and all the
// bytes that they announced. Phases have parities 0, 1, 0, ...
// ---------------------------------------------------------

// By one thread; then mbarrier_fence() by it, and a barrier of the block, before others use it.
__device__ __forceinline__ void mbarrier_init(u64* smem_barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(smem_barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void mbarrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(u64* smem_barrier) {
  asm volatile(
      "{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(shared_address(smem_barrier))
      : "memory");
}

// Arrives and announces bytes that copies will bring.
__device__ __forceinline__ void mbarrier_arrive_expect(u64* smem_barrier, u32 bytes) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
                   shared_address(smem_barrier)),
               "r"(bytes)
               : "memory");
}

// Returns when the phase of this parity is complete.
__device__ __forceinline__ void mbarrier_wait(u64* smem_barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra end;\n"
      "bra again;\nend:\n}" ::"r"(shared_address(smem_barrier)),
      "r"(parity)
      : "memory");
}

// Copies bytes by the copy engine and tells the barrier; addresses and size are multiples of 16. By one thread.
__device__ __forceinline__ void copy_bulk(void* smem, const void* gmem, u32 bytes, u64* smem_barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(smem)),
               "l"(__cvta_generic_to_global(gmem)), "r"(bytes), "r"(shared_address(smem_barrier))
               : "memory");
}

// Between ordinary accesses to shared memory and the copy engine's to the same place: in each thread, before the
// barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif

#endif
