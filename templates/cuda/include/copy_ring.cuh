// A warp's own ring of stages in shared memory: copies from global memory that it starts ahead of their use.
//
// From sm_90 on one lane starts a bulk copy per stage and all lanes wait at its barrier; before, each lane
// copies pieces of 16 bytes. Copies bypass registers, so that many are in flight whatever a kernel computes.
#pragma once
#include "common.cuh"

// STAGES copies of at most BYTES (a multiple of 16) each. Stages are used in turn: 0, 1, …, STAGES - 1, 0, …
template <int BYTES, int STAGES>
struct CopyRing {
    static_assert(BYTES % 16 == 0, "copies are made of 16-byte pieces");
    static constexpr int WARP_BYTES = STAGES * BYTES;

    unsigned char* stages;       // WARP_BYTES of this warp, 16-byte aligned
    unsigned long long* phases;  // STAGES barriers of this warp

    // Every lane calls it, before any other of these functions.
    __device__ __forceinline__ void init() {
#if GQSA_BULK_COPY
        if (threadIdx.x % WARP == 0)
            for (int i = 0; i < STAGES; ++i) barrier_init(phases + i);
        __syncwarp();
#endif
    }

    // Starts the copy of `bytes`, 0 for none, into a stage whose last content nobody reads any more. Every lane
    // calls it; a stage is waited for once for each call.
    __device__ __forceinline__ void fetch(int stage, const unsigned char* from, int bytes) {
        unsigned char* const to = stages + stage * BYTES;
#if GQSA_BULK_COPY
        if (is_elected() && bytes > 0) bulk_copy(to, from, bytes, phases + stage);
#else
        for (int i = threadIdx.x % WARP * 16; i < bytes; i += WARP * 16) copy_16(to + i, from + i);
        copy_commit();
#endif
    }

    // The stage's content, once it is there. turn: how often the stage was used before.
    __device__ __forceinline__ const unsigned char* wait(int stage, int turn) {
#if GQSA_BULK_COPY
        barrier_wait(phases + stage, turn & 1);
#else
        copy_wait<STAGES - 1>();
        __syncwarp();
#endif
        return stages + stage * BYTES;
    }
};
