// Shared declarations of the CPU engine. Plain C ABI outside, no dependency on torch.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace dgq {

// Rows of a product computed at once, and columns a packed block holds.
constexpr int TILE_ROWS = 32;
constexpr int GROUP_ROWS = 16;
constexpr int BLOCK_COLS = 16;
constexpr int TILE_COLS = 2 * BLOCK_COLS;
constexpr int MOST_COLUMNS = 64, SUBSCALES = 15;
constexpr int WIDE_BITS = 16;  // of codes that are multiplied in two halves
constexpr int K_BLOCK = 64;  // bytes of K in a cache line, and in an AMX tile row
constexpr int SCALED_K = 32;  // of K whose products of codes and four-bit weights add up in a word
constexpr int UNPACKED_K = 512;  // of K whose four-bit weights are unpacked together: two blocks of columns are 16 KiB
constexpr int KEY_BLOCK = 128;  // keys that attention passes over together

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };
enum Isa : int32_t { PORTABLE, AVX2, AVX_VNNI, AVX512, AVX512_VNNI, AVX512_VBMI, AMX, NEON_DOT, NEON_I8MM, ISA_COUNT };

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
inline int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }
// An odd number of cache lines, so that the rows of a tile do not fall into one set of the first-level cache.
inline int64_t row_stride(int64_t k) { return (ceil_div(k, K_BLOCK) | 1) * K_BLOCK; }

// Codes of one row or sample: x ~ scale * (code - zero).
struct Range {
    float low = 0.0f, high = 0.0f;  // always holds 0; infinite where a value is not finite
};
struct Codes {
    float scale, inverse;
    int32_t zero, top;
};

// Where the rows of A are, in groups of 16 that are evenly spaced. K comes in parts (the lines of a convolution's
// kernel), each a multiple of 64 bytes where there are several. They begin `at` bytes behind the groups' pointers.
struct Rows {
    const uint8_t* const* groups;
    ptrdiff_t stride;
    int64_t parts, part_k;
    ptrdiff_t part_stride, at = 0;
};

// What becomes of a row of sums. Bias, residual and out point at column 0; the first two may be null.
struct Output {
    float scale;
    int32_t zero;
    const float* bias;
    const char* residual;
    char* out;
};

// A normalization in front of a layer: over a row of a linear layer, or in `groups` of channels over a picture. gain and
// shift are (channels,).
struct Norm {
    const float *gain, *shift;
    float eps;
    int32_t groups, silu;
};

// Sum, sum of squares and range of every channel.
struct Moments {
    float *sum, *square, *low, *high;
};

// The arguments of log attention (see log_attention/__init__.py).
struct Attention {
    const void *q, *k, *v;  // element (b, h, t, i) at b * batch + h * head + t * token + i
    void* out;              // (batch, rows, heads, width), contiguous
    int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;
    int64_t batch, heads, rows, keys, width;  // keys include the start key
    float logit_scale;                        // scale * log2(e)
    int32_t bits, fraction_bits, start_token, qk_bits, v_bits, dtype;
};

// What one head's products are made of.
struct Head {
    float k_scale;     // NaN where a key or value is not finite
    float* start_k;    // (width,), minus the mean of the other keys
    float* start_v;    // (width,)
    float* v_scale;    // (width,)
    int8_t* packed_k;  // keys as columns
    int8_t* packed_v;  // channels as columns
    int32_t* start;    // base - 128 * sum of a key's codes: queries are stored as code + 128
    int32_t base;      // what a logit of zero is (logit_base)
};

// What a code of log attention stands for (log_attention/reference.py).
struct Probabilities {
    int32_t bits, fraction_bits, zero;  // the first code that stands for zero
    bool flat;                          // all codes from 127 to there stand for the same
    bool floats;                        // logits have a base (logit_base)
    alignas(64) float steps[32];     // 255 * 2^(-i / 2^fraction_bits), repeated
    alignas(64) uint8_t bytes[256];  // of every code; those from the top code on are zero
};

// A block of columns of a weight that is rounded, and groups of weights whose sub-scales are sought
// (weight_rounding/__init__.py).
struct Columns {
    float* values;  // (rows, columns), rows `values_row` apart; so are those of the others
    const float *pull, *ahead, *diagonal, *step;
    float* change;  // (rows, columns), contiguous
    int64_t rows, columns, values_row, pull_row, ahead_row;
    float low, high;
};
struct Groups {
    const float *values, *importance, *scale;  // (rows, groups, size), rows `values_row` apart; (groups, size); (rows,)
    uint8_t* best;                             // (rows, groups)
    float* error;
    int64_t rows, groups, size, values_row;
};

// What differs between instruction sets. Every implementation gives the same bits.
struct Kernels {
    // Widen `range` by n values times inv_divisor (or 1 where null); to infinity where one is not finite.
    void (*range)(const void* x, int dtype, int64_t n, const float* inv_divisor, Range& range);
    // n codes of values times inv_divisor.
    void (*quantize)(const void* x, int dtype, int64_t n, const float* inv_divisor, const Codes& codes, uint8_t* out);
    // n codes of 16 bits, their upper and lower halves.
    void (*quantize_wide)(const void* x, int dtype, int64_t n, const Codes& codes, uint8_t* high, uint8_t* low);
    // n values as bfloat16.
    void (*narrowed)(const float* x, int64_t n, uint16_t* out);
    // A row of n values to mean 0 and variance 1, times gain plus shift.
    void (*layer_norm)(const void* x, int dtype, int64_t n, const Norm& norm, float* out);
    // Of every channel over at least one pixel.
    void (*moments)(const void* x, int dtype, int64_t pixels, int64_t channels, const Moments& out);
    // Codes of x * factor + offset per channel, with x * sigmoid(x) behind it where silu says so, times inv_divisor (or
    // 1 where null).
    void (*quantize_affine)(
        const void* x, int dtype, int64_t pixels, int64_t channels, const float* factor, const float* offset, bool silu,
        const float* inv_divisor, const Codes& codes, uint8_t* out);
    // n values times inv_divisor (or 1 where null), rotated in blocks of 16, 64 or 256 that divide n; out may be x.
    void (*rotate)(const void* x, int dtype, int64_t n, const float* inv_divisor, int64_t block, float* out);
    // As quantize_affine before the quantizer; a multiple of 16 channels.
    void (*affine)(
        const void* x, int dtype, int64_t pixels, int64_t channels, const float* factor, const float* offset, bool silu,
        float* out);
    // What columns [col, col + n) of a panel's rows become: (sum - zero * column_sum) * (scale * weight_scale) + bias +
    // residual; sums in rows of 32.
    void (*epilogue)(
        const int32_t* sums, const Output* rows, int64_t count, int64_t col, int64_t n, const float* weight_scale,
        const int32_t* column_sum, int dtype);
    // The same for 16 sums of values followed by 16 of gates, whose scales, column sums and biases lie `gates` columns
    // on: value * gelu(gate).
    void (*gated_epilogue)(
        const int32_t* sums, const Output* rows, int64_t count, int64_t col, int64_t gates, const float* weight_scale,
        const int32_t* column_sum, int dtype);
    // The largest of n logits of every row; there is room for whole groups of 16 rows, and in what comes out.
    void (*largest)(const int32_t* logits, ptrdiff_t stride, int rows, int64_t n, int32_t* largest);
    // The largest logit of every row from those of its blocks of keys (blocks x TILE_ROWS), and which rows have more than
    // zeros in a block: bits of live[block], which for others may be set too. `zero` as in Probabilities; steps and the
    // largest are there for whole groups of 16 rows.
    void (*find_live)(
        const int32_t* highest, int64_t blocks, int rows, const float* step, int32_t zero, int32_t* largest,
        uint32_t* live);
    // Byte probabilities of n logits of every row, and their sums; zeros where a row does not live.
    void (*probabilities)(
        const int32_t* logits, ptrdiff_t stride, int rows, int64_t n, const int32_t* largest, const float* step,
        const Probabilities& table, const uint32_t* live, uint8_t* out, ptrdiff_t out_stride, int64_t* total);
    void (*prepare_head)(const Attention& attention, int64_t batch, int64_t number, Head& head);
    // The query at an offset: its values with zeros up to whole 16, and its codes + 128 with zeros up to
    // row_stride(width); returns the scale, NaN where a value is not finite.
    float (*prepare_query)(const Attention& attention, int64_t offset, float* values, uint8_t* codes);
    // An output row at an offset from the query's products with the values; the start key joins in float. largest is in
    // octaves. The sums, and what Head points to, are there up to whole 16.
    void (*finish_query)(
        const Attention& attention, const Head& head, const int32_t* sum, float normaliser, float largest,
        const float* values, int64_t offset);
    // int32 sums (rows x cols) of u8 A (row stride lda) and s8 blocks of 16 columns packed as [k / 4][16][4], the
    // second block b_stride bytes after the first, plus start; cols is 16 or 32, rows 1 to 32. Rows up to the next 16
    // are readable, and the result has room for them.
    void (*tile)(
        const uint8_t* a, ptrdiff_t lda, const int8_t* b, ptrdiff_t b_stride, int64_t k, int rows, int cols,
        const int32_t* start, ptrdiff_t start_stride, int32_t* c, ptrdiff_t ldc);
    // The same for any number of columns; start (of a column) may be null. Start and result have room for whole blocks of 32.
    void (*tiles)(
        const uint8_t* a, ptrdiff_t lda, const int8_t* b, ptrdiff_t b_stride, int64_t k, int rows, int64_t cols,
        const int32_t* start, int32_t* c, ptrdiff_t ldc);
    // The same from zero, of probabilities and values: only what lives is multiplied. Room for TILE_ROWS rows of A and of
    // the result. Where `pairs` says so the last block, if it is `half_full`, is one of `pair_quads`.
    bool pairs;
    void (*values)(
        const uint8_t* a, ptrdiff_t lda, const int8_t* b, ptrdiff_t b_stride, int64_t k, int rows, int64_t cols,
        const uint32_t* live, int32_t* c, ptrdiff_t ldc);
    // The sums of a panel of rows and 16 or 32 columns, in rows of 32, on top of what is there where `more` says so; room
    // for whole groups of rows.
    void (*panel)(const Rows& a, const int8_t* b, ptrdiff_t b_stride, int64_t rows, int cols, bool more, int32_t* c);
    // The same of one part, of four-bit weights and their sub-scales as `unpack` leaves them, of which the second block's
    // come scale_stride after the first's. Null where weights of eight bits are as fast.
    void (*scaled_panel)(
        const Rows& a, const int8_t* b, ptrdiff_t b_stride, const int32_t* scales, ptrdiff_t scale_stride, int64_t rows,
        int cols, bool more, int32_t* c);
    // Some groups of K of a block of four-bit weights (see four_bit_bytes), as tile takes them; or the codes alone, and
    // in `scales` [K / SCALED_K][16] the sub-scales, each twice in two words, where that is not null.
    void (*unpack)(
        const uint8_t* nibbles, const uint8_t* subscales, int64_t groups, int64_t group, int8_t* out, int32_t* scales);
    // Rows [first, first + 16), as far as there are some, of at most MOST_COLUMNS columns.
    void (*round_columns)(const Columns& columns, int64_t first);
    void (*search_subscales)(const Groups& groups, int64_t row);
    void (*thread_begin)();
    void (*thread_end)();
};

extern const Kernels* kernels;
alignas(64) inline constexpr int32_t ZEROS[TILE_COLS] = {};

// Calls body(first, end) for every run of keys in which one of `rows` (bits) lives.
template <class Body> void live_keys(const uint32_t* live, uint32_t rows, int64_t keys, const Body& body) {
    const int64_t blocks = ceil_div(keys, KEY_BLOCK);
    for (int64_t block = 0, end; block < blocks; block = end + 1) {
        for (end = block; end < blocks && live[end] & rows;) ++end;
        if (end > block) body(block * KEY_BLOCK, end < blocks ? end * KEY_BLOCK : keys);
    }
}

// Added to logits of at most 2^22 in size, makes integers of them that are, read as floats, 1.5 * 2^23 + logit.
inline int32_t logit_base(int64_t width) { return width * 127 * 127 < 1 << 22 ? 0x4b400000 : 0; }

// Memory that grows and is kept, aligned to cache lines.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    template <class T> T* get(int64_t count) {
        const size_t bytes = round_up(count * sizeof(T) + 256, 4096);
        if (bytes > size_) {
            std::free(data_);
            data_ = std::aligned_alloc(4096, bytes);
            size_ = data_ ? bytes : 0;
            if (!data_) throw std::bad_alloc();
        }
        return static_cast<T*>(data_);
    }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

// Runs task(0..count) on the threads of the OpenMP runtime that the host process already uses.
using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern ParallelRegion parallel_region;

template <class Task> void parallel(int threads, int64_t count, const Task& task) {
    struct Shared {
        const Task* task;
        std::atomic<int64_t> next;
        std::atomic<bool> failed;
        int64_t count;
    } shared{&task, {0}, {false}, count};
    auto body = [](void* argument) {
        auto& job = *static_cast<Shared*>(argument);
        kernels->thread_begin();
        try {
            for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) (*job.task)(i);
        } catch (const std::bad_alloc&) {
            job.failed = true;
        }
        kernels->thread_end();
    };
    if (threads > count) threads = static_cast<int>(count);
    if (threads <= 1 || !parallel_region)
        body(&shared);
    else
        parallel_region(body, &shared, static_cast<unsigned>(threads), 0);
    if (shared.failed) throw std::bad_alloc();
}

constexpr float INFINITE = __builtin_inff(), NOT_A_NUMBER = __builtin_nanf("");
inline bool is_finite(float x) { return x - x == 0.0f; }

// Scale and zero point of a range (docs/method.md, "integer recipe", item 1). Where the range is infinite, or wider than
// a float can tell, the scale is NaN, and with it all that becomes of the row or sample.
inline Codes codes_of(const Range& range, int bits) {
    Codes codes;
    codes.top = (1 << bits) - 1;
    codes.scale = (range.high - range.low) / static_cast<float>(codes.top);
    if (!is_finite(codes.scale)) return {NOT_A_NUMBER, NOT_A_NUMBER, 0, codes.top};
    if (!(codes.scale > 1e-30f)) codes.scale = 1.0f;
    codes.inverse = 1.0f / codes.scale;
    codes.zero = static_cast<int32_t>(__builtin_rintf(-range.low * codes.inverse));
    return codes;
}

// Whether the last block of so many columns has at most half of them.
inline bool half_full(int64_t cols) { return round_up(cols, BLOCK_COLS) - cols >= BLOCK_COLS / 2; }

// The packed weight of a product: ceil(n / 16) blocks of [round_up(k, 64) / 4][16][4] bytes.
inline int64_t block_bytes(int64_t k) { return round_up(k, K_BLOCK) * BLOCK_COLS; }

// The same of a two-level weight in four bits, whose sub-scales are of 32 or 64 values of K: in a block come first
// [round_up(k, 64) / group][group / 8][16][4] bytes, each the codes plus 8 of values i and group / 2 + i of its group, i
// counted over the second and last axis; then [round_up(k, 64) / group][8] sub-scales, of columns i and 8 + i.
inline int64_t nibble_bytes(int64_t k) { return round_up(k, K_BLOCK) * BLOCK_COLS / 2; }
inline int64_t four_bit_bytes(int64_t k, int64_t group) {
    return round_up(nibble_bytes(k) + round_up(k, K_BLOCK) / group * (BLOCK_COLS / 2), K_BLOCK);
}

}  // namespace dgq
