// Loads and stores of one or four neighbouring elements, in float. All kernels compute in float and store T.
#pragma once
#include <cuda_bf16.h>
#include <cstdint>

template <typename T, int V> struct Pack;

template <> struct Pack<float, 1> {
    static __device__ void load(const float *p, float (&v)[1]) { v[0] = *p; }
    static __device__ void store(float *p, const float (&v)[1]) { *p = v[0]; }
};

template <> struct Pack<float, 4> {
    static __device__ void load(const float *p, float (&v)[4]) {
        const float4 a = *reinterpret_cast<const float4 *>(p);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    }
    static __device__ void store(float *p, const float (&v)[4]) {
        *reinterpret_cast<float4 *>(p) = make_float4(v[0], v[1], v[2], v[3]);
    }
};

template <> struct Pack<__nv_bfloat16, 1> {
    static __device__ void load(const __nv_bfloat16 *p, float (&v)[1]) { v[0] = __bfloat162float(*p); }
    static __device__ void store(__nv_bfloat16 *p, const float (&v)[1]) { *p = __float2bfloat16(v[0]); }
};

template <> struct Pack<__nv_bfloat16, 4> {
    static __device__ void load(const __nv_bfloat16 *p, float (&v)[4]) {
        // bf16 is the upper half of a float.
        const uint2 a = *reinterpret_cast<const uint2 *>(p);
        v[0] = __uint_as_float(a.x << 16), v[1] = __uint_as_float(a.x & 0xffff0000u);
        v[2] = __uint_as_float(a.y << 16), v[3] = __uint_as_float(a.y & 0xffff0000u);
    }
    static __device__ void store(__nv_bfloat16 *p, const float (&v)[4]) {
        __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(v[0], v[1]), __floats2bfloat162_rn(v[2], v[3])};
        *reinterpret_cast<uint2 *>(p) = *reinterpret_cast<const uint2 *>(pair);
    }
};

template <int V, typename T> __device__ __forceinline__ void load(const T *p, float (&v)[V]) { Pack<T, V>::load(p, v); }
template <int V, typename T> __device__ __forceinline__ void store(T *p, const float (&v)[V]) { Pack<T, V>::store(p, v); }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Sum over the 32 lanes, the same in each of them.
__device__ __forceinline__ float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

// Instances NAME_f32_v1, NAME_f32_v4, NAME_bf16_v1 and NAME_bf16_v4 of a kernel body `NAME<T, V>`:
// INSTANCES(name, (typed parameters with T), (arguments)).
#define INSTANCE(NAME, SUFFIX, TYPE, V, PARAMETERS, ARGUMENTS)                                                          \
    extern "C" __global__ void __launch_bounds__(256) NAME##_##SUFFIX##_v##V PARAMETERS(TYPE) { NAME<TYPE, V> ARGUMENTS; }
#define INSTANCES(NAME, PARAMETERS, ARGUMENTS)                                                                         \
    INSTANCE(NAME, f32, float, 1, PARAMETERS, ARGUMENTS)                                                               \
    INSTANCE(NAME, f32, float, 4, PARAMETERS, ARGUMENTS)                                                               \
    INSTANCE(NAME, bf16, __nv_bfloat16, 1, PARAMETERS, ARGUMENTS)                                                      \
    INSTANCE(NAME, bf16, __nv_bfloat16, 4, PARAMETERS, ARGUMENTS)
