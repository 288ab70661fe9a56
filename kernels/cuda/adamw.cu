// AdamW in two launches a tensor (formulas in src/adamw/mod.rs), and the sum of squares for clipping.
// Bytes per element: moments 20, parameter 16, sum of squares 4. Limit: memory bandwidth.
#include "common.cuh"

// `scale` on the device wins over `host_scale`; it may be null.
extern "C" __global__ void __launch_bounds__(256)
    adamw_moments(float *m, const float *gradient, const float *scale, float host_scale, float beta1, float beta2,
                  size_t count) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float g = gradient[i] * (scale ? *scale : host_scale);
    float *v = m + count;
    m[i] = beta1 * m[i] + (1.0f - beta1) * g;
    v[i] = beta2 * v[i] + (1.0f - beta2) * g * g;
}

extern "C" __global__ void __launch_bounds__(256)
    adamw_parameter(float *parameter, const float *m, float keep, float rate, float second, float eps, size_t count) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float *v = m + count;
    parameter[i] = parameter[i] * keep - rate * m[i] / (sqrtf(v[i] * second) + eps);
}

// Sum over the 256 threads of a block, valid in thread 0; the tree is fixed.
static __device__ double block_sum(double x) {
    __shared__ double shared[256];
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int half = 128; half > 0; half >>= 1) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    return shared[0];
}

// Block b adds elements b * run up to (b + 1) * run.
extern "C" __global__ void __launch_bounds__(256)
    squares(const float *x, double *partials, uint32_t run, size_t count) {
    const size_t first = (size_t)blockIdx.x * run, last = first + run < count ? first + run : count;
    float sum = 0.0f;
    for (size_t i = first + threadIdx.x; i < last; i += blockDim.x) sum += x[i] * x[i];
    const double total = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// One block.
extern "C" __global__ void __launch_bounds__(256) squares_sum(const double *partials, float *result, size_t count) {
    double sum = 0.0;
    for (size_t i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
    const double total = block_sum(sum);
    if (threadIdx.x == 0) *result = (float)total;
}

// The moving average of weights; formula in src/average.rs. 12 bytes an element.
extern "C" __global__ void __launch_bounds__(256)
    move_average(float *average, const float *value, float share, size_t count) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) average[i] += share * (value[i] - average[i]);
}
