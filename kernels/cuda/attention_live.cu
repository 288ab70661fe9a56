// Masks of keys as the kernels of softmax attention in tiles read them: one bit a key. Traffic: 4 bytes a key.
#include <cstdint>

// Which of its keys count, two words of 32 for one of 64, from a mask of floats [B, keys]; one warp a word.
extern "C" __global__ void __launch_bounds__(256) attention_live(const float *mask, uint32_t *live, int keys, int words) {
    const int word = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, key = word * 32 + threadIdx.x % 32;
    if (word >= 2 * words) return;
    const uint32_t bits = __ballot_sync(~0u, key < keys && mask[(int64_t)blockIdx.y * keys + key] != 0.0f);
    if (threadIdx.x % 32 == 0) live[(int64_t)blockIdx.y * 2 * words + word] = bits;
}
