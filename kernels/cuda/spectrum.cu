// Framing, overlap-add and magnitude; definitions in src/spectrum. Limit: memory bandwidth.
#include "common.cuh"

// Grid (width / 256, frames, batch).
template <typename T> __device__ void frames(const T *x, T *y, uint32_t samples, uint32_t width, uint32_t hop) {
    const uint32_t j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= width) return;
    y[((size_t)blockIdx.z * gridDim.y + blockIdx.y) * width + j] =
        x[(size_t)blockIdx.z * samples + (size_t)blockIdx.y * hop + j];
}

// Grid (samples / 256, 1, batch): a sample gathers from the frames that cover it, in their order.
template <typename T>
__device__ void overlap_add(const T *x, T *y, uint32_t samples, uint32_t count, uint32_t width, uint32_t hop) {
    const uint32_t s = blockIdx.x * blockDim.x + threadIdx.x;
    if (s >= samples) return;
    const uint32_t first = s < width ? 0 : (s - width) / hop + 1, last = min(s / hop + 1, count);
    float sum[1] = {0.0f};
    for (uint32_t f = first; f < last; f++) {
        float part[1];
        load<1>(x + ((size_t)blockIdx.z * count + f) * width + (s - f * hop), part);
        sum[0] += part[0];
    }
    store<1>(y + (size_t)blockIdx.z * samples + s, sum);
}

template <typename T> __device__ void magnitude(const T *x, T *y, uint32_t rows, uint32_t bins, float floor) {
    const size_t row = (size_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    for (uint32_t c = threadIdx.x; c < bins; c += blockDim.x) {
        float re[1], im[1];
        load<1>(x + row * 2 * bins + c, re);
        load<1>(x + row * 2 * bins + bins + c, im);
        re[0] = sqrtf(re[0] * re[0] + im[0] * im[0] + floor);
        store<1>(y + row * bins + c, re);
    }
}

template <typename T>
__device__ void magnitude_backward(const T *x, const T *y, const T *dy, T *dx, uint32_t rows, uint32_t bins) {
    const size_t row = (size_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    for (uint32_t c = threadIdx.x; c < bins; c += blockDim.x) {
        float re[1], im[1], value[1], d[1];
        load<1>(x + row * 2 * bins + c, re);
        load<1>(x + row * 2 * bins + bins + c, im);
        load<1>(y + row * bins + c, value);
        load<1>(dy + row * bins + c, d);
        const float share = d[0] / value[0];
        re[0] *= share;
        im[0] *= share;
        store<1>(dx + row * 2 * bins + c, re);
        store<1>(dx + row * 2 * bins + bins + c, im);
    }
}

#define SPECTRUM(SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        frames_##SUFFIX(const T *x, T *y, uint32_t samples, uint32_t width, uint32_t hop) {                            \
        frames<T>(x, y, samples, width, hop);                                                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) overlap_add_##SUFFIX(                                            \
        const T *x, T *y, uint32_t samples, uint32_t count, uint32_t width, uint32_t hop) {                            \
        overlap_add<T>(x, y, samples, count, width, hop);                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        magnitude_##SUFFIX(const T *x, T *y, uint32_t rows, uint32_t bins, float floor) {                              \
        magnitude<T>(x, y, rows, bins, floor);                                                                         \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) magnitude_backward_##SUFFIX(                                     \
        const T *x, const T *y, const T *dy, T *dx, uint32_t rows, uint32_t bins) {                                    \
        magnitude_backward<T>(x, y, dy, dx, rows, bins);                                                               \
    }
SPECTRUM(f32, float)
SPECTRUM(bf16, __nv_bfloat16)
