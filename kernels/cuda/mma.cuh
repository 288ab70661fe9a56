// Tiles of bf16 in shared memory and the tensor-core instructions of compute capability 8.0 on them.
#pragma once
#include <cuda_bf16.h>
#include <cstdint>

namespace fulgur {

using bf16 = __nv_bfloat16;

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Sixteen bytes to shared memory, on their way until wait_copies; zeros where not live.
__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(live ? 16 : 0) : "memory");
}
// Four bytes, likewise.
__device__ __forceinline__ void copy4(uint32_t to, const void *from, bool live) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(live ? 4 : 0) : "memory");
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N groups of copies are on their way.
template <int N> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void store4(uint32_t to, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
__device__ __forceinline__ uint4 load16(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}

// Four 8x8 matrices, whose rows lie at the addresses of lanes 0-7, 8-15, 16-23, 24-31.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// c += a b for 16x16 by 16x8.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The lower half holds the first.
__device__ __forceinline__ uint32_t pack(float first, float second) {
    __nv_bfloat162 p = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<uint32_t *>(&p);
}
__device__ __forceinline__ float first_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float second_of(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ uint32_t scaled(uint32_t pair, float first, float second) {
    return pack(first_of(pair) * first, second_of(pair) * second);
}

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rows of WIDTH bf16. The 16-byte pieces of eight rows are permuted so that ldmatrix meets no bank twice.
template <int WIDTH> struct Tile {
    static_assert(WIDTH % 64 == 0, "eight pieces or a multiple");
    uint32_t base;
    __device__ __forceinline__ uint32_t at(int row, int piece) const {
        return base + row * (WIDTH * 2) + (((piece & ~7) | ((piece ^ row) & 7)) << 4);
    }
    // What a lane gives to ldmatrix for the 16x16 block at (row, column): the matrices are those of rows 0-7 and 8-15 at
    // columns 0-7, then at 8-15.
    __device__ __forceinline__ uint32_t block(int row, int column, int lane) const {
        return at(row + (lane & 15), (column >> 3) + (lane >> 4));
    }
};

// Starts to copy `count` of ROWS rows, of `width` elements each, a multiple of 8, into a tile; the rest becomes zeros.
template <int ROWS, int WIDTH, int THREADS>
__device__ __forceinline__ void start_rows(Tile<WIDTH> tile, const bf16 *from, int64_t stride, int count, int width) {
    constexpr int PIECES = WIDTH / 8;
#pragma unroll
    for (int item = threadIdx.x; item < ROWS * PIECES; item += THREADS) {
        const int row = item / PIECES, piece = item % PIECES;
        const bool live = row < count && piece * 8 < width;
        copy16(tile.at(row, piece), live ? from + (int64_t)row * stride + piece * 8 : from, live);
    }
}

} // namespace fulgur
