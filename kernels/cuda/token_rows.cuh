// Rows of tokens as kernels find them in global memory.
#pragma once
#include <cstdint>

namespace fulgur {

// Rows of tokens in global memory; the last axis is dense. Strides in elements.
template <typename T> struct Rows {
    T *data;
    int64_t batch, token, head;
};

} // namespace fulgur
