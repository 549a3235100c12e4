// The CPU engine: quantize, multiply and finish a layer in one call, and log attention.
#include "engine.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define DGQ_X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif
// older Clangs have the intrinsics only where the whole file is for a CPU that has the instructions
#if defined(__aarch64__) && defined(__linux__) && (!defined(__clang__) || __clang_major__ >= 16)
#define DGQ_ARM 1
#include <arm_neon.h>
#include <sys/auxv.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Functions between the two are compiled for an instruction set of their own.
#define DGQ_PRAGMA(words) _Pragma(#words)
#ifdef __clang__
#define DGQ_TARGET_BEGIN(set) DGQ_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define DGQ_TARGET_END _Pragma("clang attribute pop")
#else
#define DGQ_TARGET_BEGIN(set) _Pragma("GCC push_options") DGQ_PRAGMA(GCC target(set))
#define DGQ_TARGET_END _Pragma("GCC pop_options")
#endif

namespace dgq {

const Kernels* kernels = nullptr;
ParallelRegion parallel_region = nullptr;

// Packs one block of 16 columns: rows [16 block, 16 block + 16) of a matrix (n, k) whose rows lie `stride` apart.
static void pack_rows(const int8_t* matrix, int64_t n, int64_t k, int64_t block, int8_t* out, int64_t stride) {
    std::memset(out, 0, block_bytes(k));
    for (int64_t col = 0; col < BLOCK_COLS && block * BLOCK_COLS + col < n; ++col) {
        const int8_t* row = matrix + (block * BLOCK_COLS + col) * stride;
        int64_t i = 0;
        for (; i + 4 <= k; i += 4) std::memcpy(out + i * BLOCK_COLS + 4 * col, row + i, 4);
        for (; i < k; ++i) out[i / 4 * 4 * BLOCK_COLS + 4 * col + i % 4] = row[i];
    }
}

// The same for columns [16 block, 16 block + 16) of a row-major matrix (k, n) of whole blocks of columns; zeros beyond.
static void pack_columns(const int8_t* matrix, int64_t n, int64_t k, int64_t block, int8_t* out) {
    typedef int8_t Bytes __attribute__((vector_size(BLOCK_COLS)));
    const int64_t first = block * BLOCK_COLS, there = first < n ? k : 0;
    int64_t i = 0;
    for (; i < there; i += 4) {
        Bytes row[4] = {};
        for (int64_t j = 0; j < 4 && i + j < k; ++j) std::memcpy(row + j, matrix + (i + j) * n + first, BLOCK_COLS);
        for (int half = 0; half < 2; ++half) {
            const auto zip = [&](Bytes a, Bytes b) {
                return half ? __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
                            : __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            };
            const Bytes even = zip(row[0], row[2]), odd = zip(row[1], row[3]);
            const Bytes low = __builtin_shufflevector(
                even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            const Bytes high = __builtin_shufflevector(
                even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            std::memcpy(out + i * BLOCK_COLS + 32 * half, &low, 16);
            std::memcpy(out + i * BLOCK_COLS + 32 * half + 16, &high, 16);
        }
    }
    std::memset(out + i * BLOCK_COLS, 0, block_bytes(k) - i * BLOCK_COLS);
}

// A block of pack_columns, whose upper columns are empty, with two quads of K side by side: [k / 8][8][2][4].
static void pair_quads(int64_t k, int8_t* block) {
    typedef int32_t Quads __attribute__((vector_size(32)));
    for (int64_t pair = 0; pair < block_bytes(k) / 128; ++pair) {
        Quads even, odd;
        std::memcpy(&even, block + 128 * pair, 32);
        std::memcpy(&odd, block + 128 * pair + 64, 32);
        const Quads low = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
        const Quads high = __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
        std::memcpy(block + 64 * pair, &low, 32);
        std::memcpy(block + 64 * pair + 32, &high, 32);
    }
}

// A weight as a checkpoint stores it: int8 (n, k), or two-level int4 (dgq_kernels/packing.py). order[i] is the natural
// place of the channel stored at i, in every tap of k / channels; null where they are the same.
struct Stored {
    const int8_t* weight;                // or null
    const uint8_t *packed, *subscales;
    const int32_t* order;
    int64_t n, k, channels, group;
};

// A row in natural order; `scratch` has room for k + group values.
static void read_stored(const Stored& stored, int64_t row, int8_t* scratch, int8_t* out) {
    const int64_t k = stored.k, half = stored.group / 2;
    const int8_t* values = scratch;
    if (stored.weight) {
        values = stored.weight + row * k;
    } else {
        const int64_t groups = ceil_div(k, stored.group);
        const uint8_t* nibbles = stored.packed + row * groups * half;
        const uint8_t* scales = stored.subscales + row * ceil_div(groups, 2);
        for (int64_t g = 0; g < groups; ++g, nibbles += half) {
            const int scale = scales[g / 2] >> (g % 2 * 4) & 15;
            int8_t* to = scratch + g * stored.group;
            for (int64_t i = 0; i < half; ++i) {
                to[i] = static_cast<int8_t>(((nibbles[i] & 15 ^ 8) - 8) * scale);
                to[i + half] = static_cast<int8_t>(((nibbles[i] >> 4 ^ 8) - 8) * scale);
            }
        }
    }
    if (!stored.order) {
        std::memcpy(out, values, k);
        return;
    }
    for (int64_t tap = 0; tap < k; tap += stored.channels)
        for (int64_t i = 0; i < stored.channels; ++i) out[tap + stored.order[i]] = values[tap + i];
}

// Packs one block of 16 columns of a two-level weight in its own order, in four bits. A stored byte holds the same two
// values of a group; its codes have their sign.
static void pack_nibbles(const Stored& stored, int64_t block, uint8_t* out) {
    const int64_t group = stored.group, words = group / 8, groups = ceil_div(stored.k, group);
    uint8_t* subscales = out + nibble_bytes(stored.k);
    std::memset(out, 0x88, subscales - out);
    std::memset(subscales, 0, four_bit_bytes(stored.k, group) - (subscales - out));
    constexpr int64_t some = 32;  // groups: 8 or 16 KiB of the block, which stay in the first-level cache for all columns
    for (int64_t first = 0; first < groups; first += some) {
        const int64_t end = groups - first < some ? groups : first + some;
        for (int64_t col = 0, row = block * BLOCK_COLS; col < BLOCK_COLS && row < stored.n; ++col, ++row) {
            const uint8_t* nibbles = stored.packed + row * groups * 4 * words;
            const uint8_t* scales = stored.subscales + row * ceil_div(groups, 2);
            for (int64_t i = first * words; i < end * words; ++i) {
                uint32_t codes;
                std::memcpy(&codes, nibbles + 4 * i, 4);
                codes ^= 0x88888888u;
                std::memcpy(out + i * 4 * BLOCK_COLS + 4 * col, &codes, 4);
            }
            for (int64_t g = first; g < end; ++g) {
                const int scale = scales[g / 2] >> (g % 2 * 4) & 15;
                subscales[8 * g + col % 8] |= static_cast<uint8_t>(scale << (col / 8 * 4));
            }
        }
    }
}

// On its own, since GCC would do one value after the other where the pointer is captured.
static void to_sizes(int8_t* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = values[i] < 0 ? -values[i] : values[i];
}

// NaN where the range is infinite.
static float symmetric_scale(const Range& range, int top) {
    const float largest = range.high > -range.low ? range.high : -range.low;
    if (!is_finite(largest)) return NOT_A_NUMBER;
    return largest > 1e-30f ? largest / static_cast<float>(top) : 1.0f;
}

#define DGQ_AVX512 "avx512f,avx512bw,avx512vl,avx512dq"

#include "tiles.inc"

#define LEVEL 0
namespace plain {
#include "vector.inc"
}
#undef LEVEL
#ifdef DGQ_X86
#define LEVEL 256
DGQ_TARGET_BEGIN("avx2")
namespace vector256 {
#include "vector.inc"
}
DGQ_TARGET_END
#undef LEVEL
#define LEVEL 512
#ifdef __clang__
DGQ_TARGET_BEGIN(DGQ_AVX512)
#else
DGQ_TARGET_BEGIN(DGQ_AVX512 ",prefer-vector-width=512")
#endif
namespace vector512 {
#include "vector.inc"
}
DGQ_TARGET_END
#undef LEVEL
DGQ_TARGET_BEGIN(DGQ_AVX512 ",avx512vbmi,avx512vnni")
namespace vector512 {
#include "vbmi.inc"
}
DGQ_TARGET_END
#endif

static void nothing() {}

#define DGQ_KERNELS(ELEMENTWISE, PROBABILITIES, TILES, SCALED, BEGIN, END)                                 \
    {ELEMENTWISE::range, ELEMENTWISE::quantize, ELEMENTWISE::quantize_wide, ELEMENTWISE::narrowed,         \
     ELEMENTWISE::layer_norm, ELEMENTWISE::moments, ELEMENTWISE::quantize_affine, ELEMENTWISE::rotate,     \
     ELEMENTWISE::affine, ELEMENTWISE::epilogue, ELEMENTWISE::gated_epilogue, ELEMENTWISE::largest_of,     \
     ELEMENTWISE::find_live, ELEMENTWISE::PROBABILITIES, ELEMENTWISE::prepare_head,                        \
     ELEMENTWISE::prepare_query, ELEMENTWISE::finish_query, TILES::tile, TILES::tiles, TILES::PAIRS,       \
     TILES::values, TILES::panel, SCALED, ELEMENTWISE::unpack, ELEMENTWISE::round_columns,                 \
     ELEMENTWISE::search_subscales, BEGIN, END}

static const Kernels all_kernels[ISA_COUNT] = {
    DGQ_KERNELS(plain, probabilities, portable, nullptr, nothing, nothing),
#ifdef DGQ_X86
    DGQ_KERNELS(vector256, probabilities, avx2, avx2::scaled_panel, nothing, nothing),
    DGQ_KERNELS(vector256, probabilities, avx_vnni, nullptr, nothing, nothing),
    DGQ_KERNELS(vector512, probabilities, avx512, avx512::scaled_panel, nothing, nothing),
    DGQ_KERNELS(vector512, probabilities, avx512_vnni, nullptr, nothing, nothing),
    DGQ_KERNELS(vector512, probabilities_vbmi, avx512_vnni, nullptr, nothing, nothing),
    DGQ_KERNELS(vector512, probabilities_vbmi, amx, nullptr, amx::thread_begin, amx::thread_end),
#endif
#ifdef DGQ_ARM
    {}, {}, {}, {}, {}, {},  // those of x86
    DGQ_KERNELS(plain, probabilities, neon_dot, nullptr, nothing, nothing),
    DGQ_KERNELS(plain, probabilities, neon_i8mm, nullptr, nothing, nothing),
#endif
};

#ifdef DGQ_X86
// Which instruction sets the CPU has and the system keeps the registers of: the bits of CPUID's leaf 7, which the
// compilers' own questions know under different names or not at all.
static bool supported(int isa) {
    if (isa == PORTABLE) return true;
    unsigned most, sets, more, last, other[3], vnni = 0, basic, kept, unused;
    if (!__get_cpuid(1, &unused, &unused, &basic, &unused) || !(basic & bit_OSXSAVE)) return false;
    if (!__get_cpuid_count(7, 0, &most, &sets, &more, &last)) return false;
    if (most >= 1) __get_cpuid_count(7, 1, &vnni, &other[0], &other[1], &other[2]);
    asm("xgetbv" : "=a"(kept), "=d"(unused) : "c"(0));
    const auto all = [](unsigned word, std::initializer_list<int> bits) {
        for (const int bit : bits)
            if (!(word >> bit & 1)) return false;
        return true;
    };
    const bool avx2 = all(kept, {1, 2}) && all(sets, {5});
    const bool avx512 = avx2 && all(kept, {5, 6, 7}) && all(sets, {16, 17, 30, 31});
    const bool avx512_vnni = avx512 && all(more, {11}), vbmi = avx512_vnni && all(more, {1});
    if (isa == AVX2) return avx2;
    if (isa == AVX_VNNI) return avx2 && all(vnni, {4});
    if (isa == AVX512) return avx512;
    if (isa == AVX512_VNNI) return avx512_vnni;
    if (isa == AVX512_VBMI) return vbmi;
#ifdef __linux__
    constexpr int ask_permission = 0x1023, tile_data = 18;  // Linux grants the tiles' state on request only
    if (isa == AMX) return vbmi && all(last, {24, 25}) && syscall(SYS_arch_prctl, ask_permission, tile_data) == 0;
#endif
    return false;
}
#elif defined(DGQ_ARM)
static bool supported(int isa) {
    const bool dot = getauxval(AT_HWCAP) >> 20 & 1, i8mm = getauxval(AT_HWCAP2) >> 13 & 1;  // ASIMDDP, I8MM
    return isa == PORTABLE || (isa == NEON_DOT && dot) || (isa == NEON_I8MM && i8mm);
}
#else
static bool supported(int isa) { return isa == PORTABLE; }
#endif

// Rotated pictures up to this size are kept while they are quantized.
constexpr int64_t MOST_ROTATED_BYTES = int64_t{64} << 20;
// Floats that are made of a picture at a time, where a pixel has no more.
constexpr int64_t PIECE_VALUES = 4096;

static int64_t element_bytes(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

// One quantized layer; pointers stay valid while the layer lives.
struct Layer {
    const int8_t* packed;         // from dgq_pack
    const float* weight_scale;    // (n,)
    const int32_t* column_sum;    // (n,)
    const float* bias;            // (n,) or null
    const float* inv_divisor;     // (channels,) or null
    int64_t n, k, channels;       // k = kernel * kernel * channels
    int32_t bits, kernel, stride, padding;
    int32_t rotation;             // channels of a block that is rotated after the division, or 0
    int32_t group;                // of K, that a sub-scale is of where the weight is packed in four bits, or 0

    int64_t bytes_of_block() const { return group ? four_bit_bytes(k, group) : block_bytes(k); }
};

// Columns and rows of a product that one task works on.
struct Part {
    int64_t start, rows, first, last;  // rows [start, start + rows), columns [first, last)
};
struct Split {
    int64_t panel_rows, panels, columns, column_parts;

    int64_t parts() const { return panels * column_parts; }
    Part part(int64_t task, int64_t m, int64_t n) const {
        const int64_t start = task / column_parts * panel_rows, first = task % column_parts * columns;
        return {start, m - start < panel_rows ? m - start : panel_rows, first,
                first + columns < n ? first + columns : n};
    }
};

// The second-level cache of a core, in bytes; a common size where the system does not tell.
static int64_t second_level_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return size;
#endif
    return 1024 * 1024;
}
static int64_t panel_bytes = second_level_cache() / 4 * 3;

// Panels of A stay in the second-level cache with a block of B; few rows are shared out by columns instead.
static Split split_work(int64_t m, int64_t n, int64_t k, int threads) {
    Split split;
    int64_t rows = panel_bytes / row_stride(k) / TILE_ROWS * TILE_ROWS;
    rows = rows < TILE_ROWS ? TILE_ROWS : rows > 256 ? 256 : rows;
    int64_t panels = ceil_div(m, rows);
    if (m >= threads * TILE_ROWS) panels = round_up(panels, threads);
    split.panel_rows = round_up(ceil_div(m, panels), TILE_ROWS);
    split.panels = ceil_div(m, split.panel_rows);
    // A few panels of whole tiles may leave a thread idle (77 rows: 64 and 13), and each reads all of the weight; columns
    // divide more evenly, at the price of quantizing the rows once for every thread.
    const int64_t busiest = ceil_div(split.panels, threads) * split.panel_rows;
    const bool uneven = 4 * busiest * threads > 5 * m, mostly_weight = 8 * m <= n;
    if (m <= rows && (uneven || mostly_weight) && n >= threads * 2 * TILE_COLS) {
        split.panel_rows = round_up(m, TILE_ROWS);
        split.panels = 1;
    }
    split.column_parts = split.panels >= threads ? 1 : ceil_div(threads, split.panels);
    split.columns = round_up(ceil_div(n, split.column_parts), TILE_COLS);
    split.column_parts = ceil_div(n, split.columns);
    return split;
}

// What happens to a layer's sums. Null pointers stand for nothing.
struct Finish {
    const float* sample_bias;  // (batch, n), in place of the layer's bias
    const void* residual;      // shaped like the output
    int32_t gated;             // the second half of the columns gates the first: value * gelu(gate)
    void* y;

    Output output(int64_t row, int64_t n, int64_t size, const float* bias, const Codes& codes) const {
        const int64_t at = row * n * size;
        const char* added = residual ? static_cast<const char*>(residual) + at : nullptr;
        return {codes.scale, codes.zero, bias, added, static_cast<char*>(y) + at};
    }
};

// The sums of a panel from blocks of four bits. They are unpacked where all rows find them in the first-level cache, and
// while they are multiplied those that follow are fetched: the next of these blocks, or of those `next` bytes on.
static void multiply_four_bits(
    const Rows& a, const uint8_t* b, ptrdiff_t b_stride, ptrdiff_t next, int64_t k, int64_t group, int64_t rows,
    int cols, int32_t* c) {
    alignas(64) int8_t unpacked[2][UNPACKED_K * BLOCK_COLS];
    alignas(64) int32_t scales[2][UNPACKED_K / SCALED_K * BLOCK_COLS];
    const int64_t chunks = ceil_div(a.part_k, UNPACKED_K), chunk = round_up(ceil_div(a.part_k, chunks), K_BLOCK);
    for (int64_t part = 0; part < a.parts; ++part)
        for (int64_t done = 0; done < a.part_k; done += chunk) {
            const int64_t first = part * a.part_k + done, some = a.part_k - done < chunk ? a.part_k - done : chunk;
            for (int block = 0; block < cols / BLOCK_COLS; ++block) {
                const uint8_t* from = b + block * b_stride;
                kernels->unpack(
                    from + nibble_bytes(first), from + nibble_bytes(k) + first / group * (BLOCK_COLS / 2),
                    round_up(some, K_BLOCK) / group, group, unpacked[block], kernels->scaled_panel ? scales[block] : nullptr);
                const uint8_t* later = first + some < k ? from + nibble_bytes(first + some) : from + next;
                for (int64_t line = 0; line < nibble_bytes(chunk); line += 64) __builtin_prefetch(later + line, 0, 2);
            }
            const Rows own{a.groups, a.stride, 1, some, 0, a.at + part * a.part_stride + done};
            if (kernels->scaled_panel)
                kernels->scaled_panel(
                    own, unpacked[0], sizeof unpacked[0], scales[0], scales[1] - scales[0], rows, cols, first > 0, c);
            else
                kernels->panel(own, unpacked[0], sizeof unpacked[0], rows, cols, first > 0, c);
        }
}

// A part of a layer's output from its panel of codes; outputs are of the panel's rows. Part counts output columns, of
// which a gated layer has half as many as sums.
static void multiply_panel(
    const Layer& layer, const Rows& a, const Part& part, const Output* outputs, bool gated, int dtype) {
    static thread_local Scratch sum_scratch;
    auto* sums = sum_scratch.get<int32_t>(round_up(part.rows, TILE_ROWS) * TILE_COLS);
    const int64_t gates = layer.n / 2, step = gated ? BLOCK_COLS : TILE_COLS;
    const ptrdiff_t block = layer.bytes_of_block(), second = gated ? gates / BLOCK_COLS * block : block;
    for (int64_t col = part.first; col < part.last; col += step) {
        const int8_t* b = layer.packed + col / BLOCK_COLS * block;
        const int64_t count = part.last - col < step ? part.last - col : step;
        const int cols = gated || count > BLOCK_COLS ? TILE_COLS : BLOCK_COLS;
        for (int64_t row = 0; row < part.rows; ++row) {  // what the epilogue will read and write
            const int64_t at = col * element_bytes(dtype);
            __builtin_prefetch(outputs[row].out + at, 1, 2);
            if (outputs->residual) __builtin_prefetch(outputs[row].residual + at, 0, 2);
        }
        if (layer.group)
            multiply_four_bits(
                a, reinterpret_cast<const uint8_t*>(b), second, step / BLOCK_COLS * block, layer.k, layer.group,
                part.rows, cols, sums);
        else
            kernels->panel(a, b, second, part.rows, cols, false, sums);
        if (gated)
            kernels->gated_epilogue(
                sums, outputs, part.rows, col, gates, layer.weight_scale, layer.column_sum, dtype);
        else
            kernels->epilogue(sums, outputs, part.rows, col, count, layer.weight_scale, layer.column_sum, dtype);
    }
}

static Scratch& panel_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

static std::vector<const uint8_t*> evenly_spaced(const uint8_t* a, ptrdiff_t stride, int64_t rows) {
    std::vector<const uint8_t*> groups(ceil_div(rows, GROUP_ROWS));
    for (size_t i = 0; i < groups.size(); ++i) groups[i] = a + i * GROUP_ROWS * stride;
    return groups;
}

// Layers of the same sizes, bits and divisors on the same input share its codes.
static void linear(
    const Layer* const* layers, int64_t count, const void* x, int64_t ldx, int64_t m, int dtype, const Norm* norm,
    const Finish* finishes, int threads) {
    const Layer& one = *layers[0];
    const bool gated = finishes[0].gated;
    const int64_t k = one.k, size = element_bytes(dtype), lda = row_stride(k), n = gated ? one.n / 2 : one.n;
    const Split split = split_work(m, n, k, threads);
    parallel(threads, split.parts(), [&](int64_t task) {
        const Part part = split.part(task, m, n);
        const int64_t start = part.start, rows = part.rows;
        auto* codes = panel_scratch().get<uint8_t>(split.panel_rows * lda + 4 * k);
        auto* values = reinterpret_cast<float*>(codes + split.panel_rows * lda);
        std::vector<Codes> row_codes(rows);
        for (int64_t row = 0; row < rows; ++row) {
            const void* source = static_cast<const char*>(x) + (start + row) * ldx * size;
            int type = dtype;
            if (norm) {
                kernels->layer_norm(source, dtype, k, *norm, values);
                source = values;
                type = FLOAT32;
            }
            const float* inv_divisor = one.inv_divisor;
            if (one.rotation) {
                kernels->rotate(source, type, k, inv_divisor, one.rotation, values);
                source = values;
                type = FLOAT32;
                inv_divisor = nullptr;
            }
            Range range;
            kernels->range(source, type, k, inv_divisor, range);
            row_codes[row] = codes_of(range, one.bits);
            uint8_t* out = codes + row * lda;
            kernels->quantize(source, type, k, inv_divisor, row_codes[row], out);
            std::memset(out + k, 0, round_up(k, K_BLOCK) - k);
        }
        const std::vector<const uint8_t*> groups = evenly_spaced(codes, lda, rows);
        std::vector<Output> outputs(rows);
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t row = 0; row < rows; ++row)
                outputs[row] = finishes[i].output(start + row, n, size, layers[i]->bias, row_codes[row]);
            multiply_panel(*layers[i], {groups.data(), lda, 1, k, 0}, part, outputs.data(), gated, dtype);
        }
    });
}

// x * sigmoid(x) falls down to its minimum and rises from there: its range over [low, high], with 0.
static Range silu_range(float low, float high) {
    constexpr double where = -1.2784645427610738, minimum = -0.2784645427610738;
    const auto silu = [](double x) { return x / (1.0 + std::exp(-x)); };
    const double a = silu(low), b = silu(high), least = low >= where ? a : high <= where ? b : minimum;
    const double most = a > b ? a : b;
    return {static_cast<float>(least < 0.0 ? least : 0.0), static_cast<float>(most > 0.0 ? most : 0.0)};
}

// A line of pixels in pieces that stay in the first-level cache as floats.
struct Pieces {
    int64_t width, pixels;

    Pieces(int64_t line, int64_t channels)
        : width(line), pixels(PIECE_VALUES / channels > 0 ? PIECE_VALUES / channels : 1) {}
    template <class Task> void each(const Task& task) const {
        for (int64_t column = 0; column < width; column += pixels)
            task(column, width - column < pixels ? width - column : pixels);
    }
};

// GroupNorm of channels-last pictures as a factor and an offset for every sample and channel, and the range of what
// comes out, SiLU included. One pass over the pictures: the range follows from that of every channel.
struct Affine {
    std::vector<float> values;  // (batch, 2, channels)
    std::vector<Range> ranges;  // (batch,)
};
static Affine group_norm(
    const Norm& norm, const float* inv_divisor, const char* x, int64_t batch, int64_t height, int64_t width,
    int64_t channels, int dtype, int threads) {
    const int64_t line_bytes = width * channels * element_bytes(dtype), size = channels / norm.groups;
    std::vector<float> all(batch * height * 4 * channels);
    const auto of_line = [&](int64_t line) -> Moments {
        float* at = all.data() + line * 4 * channels;
        return {at, at + channels, at + 2 * channels, at + 3 * channels};
    };
    parallel(threads, batch * height, [&](int64_t line) {
        kernels->moments(x + line * line_bytes, dtype, width, channels, of_line(line));
    });
    Affine affine{std::vector<float>(batch * 2 * channels), std::vector<Range>(batch)};
    const auto count = static_cast<double>(height * width * size);
    for (int64_t b = 0; b < batch; ++b) {
        const Moments first = of_line(b * height);
        std::vector<double> sum(channels, 0.0), square(channels, 0.0);
        for (int64_t line = b * height; line < (b + 1) * height; ++line) {
            const Moments one = of_line(line);
            for (int64_t c = 0; c < channels; ++c) {
                sum[c] += one.sum[c];
                square[c] += one.square[c];
                first.low[c] = one.low[c] < first.low[c] ? one.low[c] : first.low[c];
                first.high[c] = one.high[c] > first.high[c] ? one.high[c] : first.high[c];
            }
        }
        float *factors = affine.values.data() + b * 2 * channels, *offsets = factors + channels;
        float low = INFINITE, high = -INFINITE;
        Range divided;
        bool finite = true;
        for (int64_t start = 0; start < channels; start += size) {
            double total = 0.0, squares = 0.0;
            for (int64_t c = start; c < start + size; ++c) {
                total += sum[c];
                squares += square[c];
            }
            const double mean = total / count, variance = squares / count - mean * mean;
            const double factor = 1.0 / std::sqrt((variance > 0.0 ? variance : 0.0) + norm.eps);
            for (int64_t c = start; c < start + size; ++c) {
                factors[c] = static_cast<float>(factor * norm.gain[c]);
                offsets[c] = static_cast<float>(norm.shift[c] - mean * factor * norm.gain[c]);
                const float p = first.low[c] * factors[c] + offsets[c], q = first.high[c] * factors[c] + offsets[c];
                low = std::fmin(low, std::fmin(p, q));
                high = std::fmax(high, std::fmax(p, q));
                if (!is_finite(p) || !is_finite(q)) {
                    finite = false;
                    offsets[c] = NOT_A_NUMBER;
                }
                if (!inv_divisor) continue;
                const float least = std::fmin(p, q), most = std::fmax(p, q);
                const Range one = norm.silu ? silu_range(least, most) : Range{least, most};
                const float u = one.low * inv_divisor[c], v = one.high * inv_divisor[c];
                divided.low = std::fmin(divided.low, std::fmin(u, v));
                divided.high = std::fmax(divided.high, std::fmax(u, v));
                finite &= is_finite(u) && is_finite(v);
            }
        }
        if (!finite)
            affine.ranges[b] = {-INFINITE, INFINITE};
        else if (inv_divisor)
            affine.ranges[b] = divided;
        else
            affine.ranges[b] = norm.silu ? silu_range(low, high) : Range{std::fmin(low, 0.0f), std::fmax(high, 0.0f)};
    }
    return affine;
}

// A normalized picture of floats, of a multiple of 16 channels.
static void normalize(
    const Norm& norm, const void* x, int64_t batch, int64_t height, int64_t width, int64_t channels, int dtype, void* y,
    int threads) {
    const int64_t size = element_bytes(dtype), line_bytes = width * channels * size;
    const char* source = static_cast<const char*>(x);
    const Affine affine = group_norm(norm, nullptr, source, batch, height, width, channels, dtype, threads);
    parallel(threads, batch * height, [&](int64_t line) {
        const float* factor = affine.values.data() + line / height * 2 * channels;
        const Pieces pieces(width, channels);
        auto* scratch = dtype == FLOAT32 ? nullptr : panel_scratch().get<float>(pieces.pixels * channels);
        pieces.each([&](int64_t column, int64_t count) {
            const int64_t at = line * line_bytes + column * channels * size;
            char* out = static_cast<char*>(y) + at;
            float* values = scratch ? scratch : reinterpret_cast<float*>(out);
            kernels->affine(source + at, dtype, count, channels, factor, factor + channels, norm.silu, values);
            if (scratch) kernels->narrowed(scratch, count * channels, reinterpret_cast<uint16_t*>(out));
        });
    });
}

static Range joined(const Range* ranges, int64_t count) {
    Range all;
    for (int64_t i = 0; i < count; ++i) {
        all.low = ranges[i].low < all.low ? ranges[i].low : all.low;
        all.high = ranges[i].high > all.high ? ranges[i].high : all.high;
    }
    return all;
}

// Pictures of codes in a border of their zero points, one behind the other. The memory is the calling thread's, until
// it makes others.
struct Pictures {
    const uint8_t* codes;
    int64_t line_bytes, image_bytes;
    std::vector<Codes> sample;  // of every picture
};

static uint8_t* picture_codes(int64_t bytes) {
    static thread_local Scratch scratch;
    return scratch.get<uint8_t>(bytes);
}

// Where the windows of a convolution's output pixels begin in padded pictures of codes. The rows of the product are
// these pixels. Where 16 of them lie in one line of the picture and a line of the kernel is whole blocks of K, they are
// multiplied where they are; else a panel is gathered as it is needed.
struct Windows {
    const uint8_t* codes;
    int64_t image_bytes, line_bytes, out_height, out_width, kernel, stride, channels;

    bool in_place() const { return out_width % GROUP_ROWS == 0 && kernel * channels % K_BLOCK == 0; }
    const uint8_t* corner(int64_t pixel) const {
        const int64_t line = pixel / out_width % out_height, column = pixel % out_width;
        return codes + pixel / (out_height * out_width) * image_bytes + line * stride * line_bytes +
               column * stride * channels;
    }
};

static void multiply_windows(
    const Layer& layer, const Windows& windows, const Part& part, const Output* outputs, int dtype) {
    const int64_t run = windows.kernel * windows.channels, lda = row_stride(layer.k);
    if (windows.in_place()) {
        std::vector<const uint8_t*> groups(ceil_div(part.rows, GROUP_ROWS));
        for (size_t i = 0; i < groups.size(); ++i) groups[i] = windows.corner(part.start + i * GROUP_ROWS);
        const Rows a{groups.data(), windows.stride * windows.channels, windows.kernel, run, windows.line_bytes};
        multiply_panel(layer, a, part, outputs, false, dtype);
        return;
    }
    auto* panel = panel_scratch().get<uint8_t>(round_up(part.rows, TILE_ROWS) * lda);
    for (int64_t row = 0; row < part.rows; ++row) {
        const uint8_t* from = windows.corner(part.start + row);
        uint8_t* out = panel + row * lda;
        for (int64_t tap = 0; tap < windows.kernel; ++tap)
            std::memcpy(out + tap * run, from + tap * windows.line_bytes, run);
        std::memset(out + layer.k, 0, round_up(layer.k, K_BLOCK) - layer.k);
    }
    const std::vector<const uint8_t*> groups = evenly_spaced(panel, lda, part.rows);
    multiply_panel(layer, {groups.data(), lda, 1, layer.k, 0}, part, outputs, false, dtype);
}

// What a layer makes of pictures before it multiplies them: normalized, divided, rotated, and as codes of up to 8 bits.
static Pictures quantize_pictures(
    const Layer& layer, const void* x, int64_t batch, int64_t height, int64_t width, int dtype, const Norm* norm,
    int threads) {
    const int64_t size = element_bytes(dtype), channels = layer.channels, pad = layer.padding;
    const int64_t padded_height = height + 2 * pad, padded_width = width + 2 * pad;
    const char* source = static_cast<const char*>(x);
    const float* inv_divisor = layer.inv_divisor;
    int in_dtype = dtype;

    const int64_t line_bytes = padded_width * channels, image_bytes = padded_height * line_bytes;
    auto* codes = picture_codes(batch * image_bytes);

    std::vector<Codes> sample(batch);
    Affine affine;
    if (norm)
        affine = group_norm(
            *norm, layer.rotation ? nullptr : inv_divisor, source, batch, height, width, channels, dtype, threads);
    const Norm* const before = norm;
    const int64_t line_values = width * channels;
    const Pieces pieces(width, channels);
    const auto rotate_pixels = [&](int64_t line, int64_t column, int64_t count, float* out) {
        const void* in = static_cast<const char*>(x) + (line * line_values + column * channels) * size;
        if (before) {
            const float* factor = affine.values.data() + line / height * 2 * channels;
            kernels->affine(in, dtype, count, channels, factor, factor + channels, before->silu, out);
            in = out;
        }
        const int64_t step = channels * (before ? 4 : size);
        for (int64_t pixel = 0; pixel < count; ++pixel)
            kernels->rotate(
                static_cast<const char*>(in) + pixel * step, before ? FLOAT32 : dtype, channels, layer.inv_divisor,
                layer.rotation, out + pixel * channels);
    };
    // A picture's range is that of what the rotation makes of it, so that is kept; of a large picture it is made twice,
    // as its copy would be as large as all else that a decoder holds.
    const bool kept = batch * height * line_values * 4 <= MOST_ROTATED_BYTES;
    float* rotated = nullptr;
    if (layer.rotation) {
        static thread_local Scratch rotated_scratch;
        if (kept) rotated = rotated_scratch.get<float>(batch * height * line_values);
        source = reinterpret_cast<const char*>(rotated);
        in_dtype = FLOAT32;
        inv_divisor = nullptr;
        norm = nullptr;
    }
    const int64_t in_size = element_bytes(in_dtype);
    if (norm) {
        for (int64_t b = 0; b < batch; ++b) sample[b] = codes_of(affine.ranges[b], layer.bits);
    } else {
        std::vector<Range> ranges(batch * height);
        parallel(threads, batch * height, [&](int64_t line) {
            if (layer.rotation) {
                auto* scratch = kept ? nullptr : panel_scratch().get<float>(pieces.pixels * channels);
                pieces.each([&](int64_t column, int64_t count) {
                    float* out = kept ? rotated + line * line_values + column * channels : scratch;
                    rotate_pixels(line, column, count, out);
                    kernels->range(out, FLOAT32, count * channels, nullptr, ranges[line]);
                });
                return;
            }
            const char* in = source + line * line_values * in_size;
            for (int64_t column = 0; column < (inv_divisor ? width : 1); ++column)
                kernels->range(
                    in + column * channels * in_size, in_dtype, inv_divisor ? channels : line_values, inv_divisor,
                    ranges[line]);
        });
        for (int64_t b = 0; b < batch; ++b) sample[b] = codes_of(joined(&ranges[b * height], height), layer.bits);
    }
    parallel(threads, batch * padded_height, [&](int64_t line) {
        const int64_t b = line / padded_height, row = line % padded_height - pad;
        uint8_t* out = codes + line * line_bytes;
        if (row < 0 || row >= height) {
            std::memset(out, sample[b].zero, line_bytes);
            return;
        }
        std::memset(out, sample[b].zero, pad * channels);
        std::memset(out + (pad + width) * channels, sample[b].zero, pad * channels);
        out += pad * channels;
        if (layer.rotation && !kept) {
            auto* scratch = panel_scratch().get<float>(pieces.pixels * channels);
            pieces.each([&](int64_t column, int64_t count) {
                rotate_pixels(b * height + row, column, count, scratch);
                kernels->quantize(scratch, FLOAT32, count * channels, nullptr, sample[b], out + column * channels);
            });
            return;
        }
        const char* in = source + (b * height + row) * line_values * in_size;
        if (norm) {
            const float* factor = affine.values.data() + b * 2 * channels;
            kernels->quantize_affine(
                in, dtype, width, channels, factor, factor + channels, norm->silu, inv_divisor, sample[b], out);
            return;
        }
        if (!inv_divisor) {
            kernels->quantize(in, in_dtype, line_values, nullptr, sample[b], out);
            return;
        }
        for (int64_t column = 0; column < width; ++column)
            kernels->quantize(
                in + column * channels * size, dtype, channels, inv_divisor, sample[b], out + column * channels);
    });
    return {codes, line_bytes, image_bytes, sample};
}

static void convolve(
    const Layer& layer, const void* x, int64_t batch, int64_t height, int64_t width, int dtype, const Norm* norm,
    const Finish& finish, int threads) {
    const int64_t size = element_bytes(dtype), kernel = layer.kernel;
    const int64_t out_height = (height + 2 * layer.padding - kernel) / layer.stride + 1;
    const int64_t out_width = (width + 2 * layer.padding - kernel) / layer.stride + 1;
    const Pictures pictures = quantize_pictures(layer, x, batch, height, width, dtype, norm, threads);

    const int64_t m = batch * out_height * out_width;
    const Windows windows{pictures.codes, pictures.image_bytes, pictures.line_bytes, out_height, out_width,
                          kernel, layer.stride, layer.channels};
    const Split split = split_work(m, layer.n, windows.in_place() ? layer.channels : layer.k, threads);
    parallel(threads, split.parts(), [&](int64_t task) {
        const Part part = split.part(task, m, layer.n);
        std::vector<Output> outputs(part.rows);
        for (int64_t row = 0; row < part.rows; ++row) {
            const int64_t b = (part.start + row) / (out_height * out_width);
            const float* bias = finish.sample_bias ? finish.sample_bias + b * layer.n : layer.bias;
            outputs[row] = finish.output(part.start + row, layer.n, size, bias, pictures.sample[b]);
        }
        multiply_windows(layer, windows, part, outputs.data(), dtype);
    });
}

// The same of 16 bits, neither divided nor rotated: pictures of the codes' upper halves, and of their lower ones.
static std::vector<Pictures> quantize_wide_pictures(
    const Layer& layer, const void* x, int64_t batch, int64_t height, int64_t width, int dtype, int threads) {
    const int64_t channels = layer.channels, line_values = width * channels;
    const auto line_of = [&](int64_t line) -> const char* {
        return static_cast<const char*>(x) + line * line_values * element_bytes(dtype);
    };
    const int64_t line_bytes = (width + 2) * channels, image_bytes = (height + 2) * line_bytes;
    auto* high_codes = picture_codes(2 * batch * image_bytes);
    auto* low_codes = high_codes + batch * image_bytes;

    std::vector<Range> ranges(batch * height);
    parallel(threads, batch * height, [&](int64_t line) {
        kernels->range(line_of(line), dtype, line_values, nullptr, ranges[line]);
    });
    std::vector<Codes> sample(batch), high(batch), low(batch);
    for (int64_t b = 0; b < batch; ++b) {
        sample[b] = high[b] = low[b] = codes_of(joined(&ranges[b * height], height), WIDE_BITS);
        high[b].scale *= 256.0f;
        high[b].zero >>= 8;
        low[b].zero &= 255;
    }
    parallel(threads, batch * (height + 2), [&](int64_t line) {
        const int64_t b = line / (height + 2), row = line % (height + 2) - 1;
        uint8_t *first = high_codes + line * line_bytes, *second = low_codes + line * line_bytes;
        const bool inside = row >= 0 && row < height;
        const int64_t end = line_bytes - channels, border = inside ? channels : end;
        std::memset(first, high[b].zero, border);
        std::memset(second, low[b].zero, border);
        std::memset(first + end, high[b].zero, channels);
        std::memset(second + end, low[b].zero, channels);
        if (!inside) return;
        kernels->quantize_wide(
            line_of(b * height + row), dtype, line_values, sample[b], first + channels, second + channels);
    });
    return {{high_codes, line_bytes, image_bytes, high}, {low_codes, line_bytes, image_bytes, low}};
}

// A nearest upsampling by two and a 3x3 convolution: a convolution of 2x2 taps for each place in a square of four equal
// pixels. Each has a quarter of the layer's columns, and its results lie between the others'. Codes of 16 bits take two
// products of their halves, the first of which the second adds to its own, in float32 whatever comes out.
static void upsample(
    const Layer& layer, const void* x, int64_t batch, int64_t height, int64_t width, int dtype, void* y, int threads) {
    const bool wide = layer.bits == WIDE_BITS, apart = wide && dtype != FLOAT32;
    const int64_t size = element_bytes(dtype), channels = layer.channels, n = layer.n / 4;
    std::vector<Pictures> halves;  // of the codes, or these as they are
    if (wide)
        halves = quantize_wide_pictures(layer, x, batch, height, width, dtype, threads);
    else
        halves.push_back(quantize_pictures(layer, x, batch, height, width, dtype, nullptr, threads));

    const int64_t m = batch * height * width, line_bytes = halves[0].line_bytes;
    const Windows whole{halves[0].codes, halves[0].image_bytes, line_bytes, height, width, 2, 1, channels};
    // All places of some rows are one task, so that their codes stay in the cache; few rows are shared out by columns,
    // which are those of all places.
    const Split split = split_work(m, layer.n, whole.in_place() ? channels : layer.k, threads);
    parallel(threads, split.parts(), [&](int64_t task) {
        const Part part = split.part(task, m, layer.n);
        std::vector<Output> outputs(part.rows);
        static thread_local Scratch sum_scratch;
        auto* sums = apart ? sum_scratch.get<float>(part.rows * n) : nullptr;
        for (int64_t place = part.first / n; place * n < part.last; ++place) {
            const int64_t down = place / 2, across = place % 2, first = place * n;
            Part own_part = part;
            own_part.first = part.first > first ? part.first - first : 0;
            own_part.last = part.last - first < n ? part.last - first : n;
            Layer own = layer;
            own.n = n;
            own.packed += first / BLOCK_COLS * layer.bytes_of_block();
            own.weight_scale += first;
            own.column_sum += first;
            const auto out_of = [&](int64_t row) {
                const int64_t pixel = part.start + row, line = pixel / width;  // of all pictures
                return static_cast<char*>(y) +
                       ((2 * line + down) * 2 * width + 2 * (pixel % width) + across) * n * size;
            };
            for (const Pictures& half : halves) {
                const bool is_first = &half == &halves.front(), is_last = &half == &halves.back();
                for (int64_t row = 0; row < part.rows; ++row) {
                    const Codes& codes = half.sample[(part.start + row) / width / height];
                    char* out = apart ? reinterpret_cast<char*>(sums + row * n) : out_of(row);
                    const float* bias = is_last && layer.bias ? layer.bias + first : nullptr;
                    outputs[row] = {codes.scale, codes.zero, bias, is_first ? nullptr : out, out};
                }
                Windows windows = whole;
                windows.codes = half.codes + down * line_bytes + across * channels;
                multiply_windows(own, windows, own_part, outputs.data(), wide ? FLOAT32 : dtype);
            }
            for (int64_t row = 0; apart && row < part.rows; ++row)
                kernels->narrowed(
                    sums + row * n + own_part.first, own_part.last - own_part.first,
                    reinterpret_cast<uint16_t*>(out_of(row)) + own_part.first);
        }
    });
}

static void attend(const Attention& a, int threads) {
    const int64_t width = a.width, count = a.keys - a.start_token, heads = a.batch * a.heads;
    const int64_t k_bytes = round_up(count, TILE_COLS) / BLOCK_COLS * block_bytes(width);
    const int64_t v_bytes = round_up(width, TILE_COLS) / BLOCK_COLS * block_bytes(count);
    const int64_t starts = round_up(count, TILE_COLS), floats = 3 * round_up(width, 16);
    const int64_t head_bytes = k_bytes + v_bytes + 4 * (starts + floats);
    static thread_local Scratch head_scratch;
    auto* memory = head_scratch.get<char>(heads * head_bytes);
    std::vector<Head> all(heads);
    for (int64_t i = 0; i < heads; ++i) {
        char* at = memory + i * head_bytes;
        all[i].packed_k = reinterpret_cast<int8_t*>(at);
        all[i].packed_v = reinterpret_cast<int8_t*>(at + k_bytes);
        all[i].start = reinterpret_cast<int32_t*>(at + k_bytes + v_bytes);
        all[i].v_scale = reinterpret_cast<float*>(all[i].start + starts);
        all[i].start_k = all[i].v_scale + floats / 3;
        all[i].start_v = all[i].start_k + floats / 3;
        all[i].base = logit_base(width);
    }
    parallel(threads, heads, [&](int64_t i) { kernels->prepare_head(a, i / a.heads, i % a.heads, all[i]); });

    Probabilities table{a.bits, a.fraction_bits, 0, true, logit_base(width) != 0, {}, {}};
    const int steps = 1 << a.fraction_bits;
    const auto probability = [&](int code) { return 255.0 * std::exp2(-static_cast<double>(code) / steps); };
    for (int i = 0; i < 32; ++i) table.steps[i] = static_cast<float>(probability(i % steps));
    for (int code = 0; code < (1 << a.bits) - 1; ++code)
        table.bytes[code] = static_cast<uint8_t>(std::nearbyint(probability(code)));
    while (table.bytes[table.zero]) ++table.zero;
    for (int code = 128; code < table.zero; ++code) table.flat &= table.bytes[code] == table.bytes[127];
    const int64_t blocks = ceil_div(a.rows, TILE_ROWS), key_blocks = ceil_div(count, KEY_BLOCK);
    const int64_t q_stride = row_stride(width), q_floats = round_up(width, 16), p_stride = row_stride(count);
    const int64_t logit_stride = round_up(count, TILE_COLS) + 16, out_stride = round_up(width, TILE_COLS);
    const int64_t size = element_bytes(a.dtype);
    parallel(threads, heads * blocks, [&](int64_t task) {
        const Head& head = all[task / blocks];
        const int64_t b = task / blocks / a.heads, h = task / blocks % a.heads, start = task % blocks * TILE_ROWS;
        const int rows = static_cast<int>(a.rows - start < TILE_ROWS ? a.rows - start : TILE_ROWS);
        // a head's part of a token is short, and the next one's far: where results go, and what the next block reads,
        // are on their way while this block is multiplied
        for (int64_t row = start; row < start + 2 * TILE_ROWS && row < a.rows; ++row) {
            const bool next = row >= start + TILE_ROWS;
            const char* out = static_cast<const char*>(a.out) + ((b * a.rows + row) * a.heads + h) * width * size;
            const char* q = static_cast<const char*>(a.q) + (b * a.q_batch + h * a.q_head + row * a.q_token) * size;
            for (int64_t at = 0; at < width * size; at += 64)
                if (next)
                    __builtin_prefetch(q + at, 0, 2);
                else
                    __builtin_prefetch(out + at, 1, 2);
        }
        const int64_t bytes = TILE_ROWS * (q_stride + p_stride + 4 * (logit_stride + out_stride + q_floats)) +
                              4 * key_blocks * (TILE_ROWS + 1);
        char* memory = panel_scratch().get<char>(bytes);
        auto* codes = reinterpret_cast<uint8_t*>(memory);
        auto* p = codes + TILE_ROWS * q_stride;
        auto* logits = reinterpret_cast<int32_t*>(p + TILE_ROWS * p_stride);
        auto* sums = logits + TILE_ROWS * logit_stride;
        auto* queries = reinterpret_cast<float*>(sums + TILE_ROWS * out_stride);
        auto* highest = reinterpret_cast<int32_t*>(queries + TILE_ROWS * q_floats);
        auto* live = reinterpret_cast<uint32_t*>(highest + TILE_ROWS * key_blocks);
        float q_scale[TILE_ROWS];
        for (int row = 0; row < rows; ++row)
            q_scale[row] = kernels->prepare_query(
                a, b * a.q_batch + h * a.q_head + (start + row) * a.q_token, queries + row * q_floats,
                codes + row * q_stride);
        const ptrdiff_t k_block = block_bytes(width), v_block = block_bytes(count);
        const float key_step = head.k_scale * (a.logit_scale * static_cast<float>(1 << a.fraction_bits));
        int32_t largest[TILE_ROWS];
        int64_t total[TILE_ROWS];
        float step[TILE_ROWS] = {};
        for (int row = 0; row < rows; ++row) {
            step[row] = q_scale[row] * key_step;
            std::memset(p + row * p_stride + count, 0, round_up(count, K_BLOCK) - count);
        }
        // a block's logits are compared while they are in the first-level cache
        for (int64_t first = 0; first < count; first += KEY_BLOCK) {
            const int64_t some = count - first < KEY_BLOCK ? count - first : KEY_BLOCK;
            kernels->tiles(
                codes, q_stride, head.packed_k + first / BLOCK_COLS * k_block, k_block, width, rows, some,
                head.start + first, logits + first, logit_stride);
            kernels->largest(logits + first, logit_stride, rows, some, highest + first / KEY_BLOCK * TILE_ROWS);
        }
        kernels->find_live(highest, key_blocks, rows, step, table.zero, largest, live);
        kernels->probabilities(logits, logit_stride, rows, count, largest, step, table, live, p, p_stride, total);
        kernels->values(p, p_stride, head.packed_v, v_block, count, rows, width, live, sums, out_stride);
        const float octave_step = key_step / static_cast<float>(1 << a.fraction_bits);
        for (int row = 0; row < rows; ++row)
            kernels->finish_query(
                a, head, sums + row * out_stride, static_cast<float>(total[row]) + 0.0f * step[row],
                static_cast<float>(largest[row] - head.base) * (q_scale[row] * octave_step), queries + row * q_floats,
                ((b * a.rows + start + row) * a.heads + h) * width);
    });
}

// What a call may end in; dgq_error has the words.
enum Error : int32_t {
    NONE, NO_MEMORY, NO_ISA, THREADS, NO_POINTER, DTYPE, LAYER_SIZES, BITS, GROUP, ORDER, UNEQUAL, NOT_LINEAR, GATE,
    NORM, WINDOW, ROTATION, UPSAMPLED, INPUT_SIZES, ATTENTION_SIZES, ATTENTION_BITS, LOGIT_SCALE, BLOCK_SIZES,
    ERROR_COUNT
};
static const char* const error_texts[ERROR_COUNT] = {
    "done",
    "out of memory",
    "no instruction set that this CPU has was chosen",
    "1 to 65536 threads expected",
    "a tensor is missing",
    "float32 or bfloat16 expected",
    "sizes of a weight expected: n outputs, k = kernel^2 * channels inputs, below 2^24",
    "codes of 2 to 8 bits expected, of 16 in an upsampling alone",
    "groups of an even number of values expected, and to keep four bits, of 32 or 64 of a weight in its own order",
    "the order of the channels is not a permutation",
    "layers that share an input need equal sizes, bits and rotations, the same divisors and no residual",
    "a linear layer has a kernel of 1",
    "only whole blocks of outputs can be gated, and without a residual",
    "a norm needs a finite eps; in a linear layer no groups and no SiLU; in a convolution groups that divide the "
    "channels",
    "a stride of at least 1, a padding of at least 0 and a picture of at least the kernel's size expected",
    "a rotation of 16, 64 or 256 channels that divides them expected, or 0",
    "an upsampling has a kernel of 2, a stride and a padding of 1, and four times a multiple of 16 outputs; of codes "
    "of 16 bits neither divisors nor a rotation",
    "an input is empty, or too large for memory",
    "attention needs 1 to 66311 keys (the start key apart), 1 to 32768 channels, and tensors that memory can hold",
    "codes of 2 to 8 bits expected, and 0 to 5 fractional bits of a probability's, no more than it has",
    "a positive, finite scale of the logits expected",
    "1 to 64 columns and values of a group expected, and matrices that memory can hold",
};

struct Refused {
    Error error;
};
static void expect(bool holds, Error otherwise) {
    if (!holds) throw Refused{otherwise};
}

// Whether sizes are positive, and their product is far from overflowing.
static bool fits(std::initializer_list<int64_t> sizes) {
    int64_t product = 1;
    for (const int64_t size : sizes) {
        if (size < 1 || size > (int64_t{1} << 46) / product) return false;
        product *= size;
    }
    return true;
}

constexpr int64_t MOST_K = (1 << 24) - 1;                   // a sum of int8 weights stays in int32
constexpr int64_t MOST_KEYS = INT32_MAX / (255 * 127), MOST_WIDTH = 1 << 15;  // and so do attention's products

static bool are_four_bits(int64_t group) { return group == 32 || group == 64; }
static bool are_bits(int32_t bits) { return bits >= 2 && bits <= 8; }

static void check_call(int32_t dtype, int32_t threads) {
    expect(kernels, NO_ISA);
    expect(threads >= 1 && threads <= 65536, THREADS);
    expect(dtype == FLOAT32 || dtype == BFLOAT16, DTYPE);
}

static void check_layer(const Layer& layer) {
    expect(layer.packed && layer.weight_scale && layer.column_sum, NO_POINTER);
    const int64_t kernel = layer.kernel, k = layer.k, channels = layer.channels;
    expect(fits({layer.n, k}) && k <= MOST_K, LAYER_SIZES);
    const bool whole = kernel >= 1 && kernel <= k && channels >= 1 && k % channels == 0;
    expect(whole && kernel * kernel == k / channels, LAYER_SIZES);
    expect(are_bits(layer.bits) || layer.bits == WIDE_BITS, BITS);
    expect(layer.stride >= 1 && layer.padding >= 0, WINDOW);
    const int32_t block = layer.rotation;
    expect(block == 0 || ((block == 16 || block == 64 || block == 256) && channels % block == 0), ROTATION);
    expect(!layer.group || are_four_bits(layer.group), GROUP);
}

static void check_norm(const Norm& norm, bool fitting) {
    expect(norm.gain && norm.shift, NO_POINTER);
    expect(fitting && norm.eps >= 0.0f && norm.eps < INFINITE, NORM);
}

static void check_stored(const Stored& stored) {
    const int64_t n = stored.n, k = stored.k, channels = stored.channels;
    expect(stored.weight || (stored.packed && stored.subscales), NO_POINTER);
    expect(fits({n, k}) && k <= MOST_K && channels >= 1 && k % channels == 0, LAYER_SIZES);
    expect(stored.weight || (stored.group >= 2 && stored.group <= MOST_K && stored.group % 2 == 0), GROUP);
    if (!stored.order) return;
    std::vector<bool> seen(channels, false);
    for (int64_t i = 0; i < channels; ++i) {
        const int32_t at = stored.order[i];
        expect(at >= 0 && at < channels && !seen[at], ORDER);
        seen[at] = true;
    }
}

static void check_attention(const Attention& a) {
    expect(a.q && a.k && a.v && a.out, NO_POINTER);
    const int64_t start = a.start_token;
    expect((start == 0 || start == 1) && a.keys > start && a.keys <= MOST_KEYS + start, ATTENTION_SIZES);
    expect(a.width >= 1 && a.width <= MOST_WIDTH, ATTENTION_SIZES);
    expect(fits({a.batch, a.heads, a.rows, a.width, 8}), ATTENTION_SIZES);
    expect(fits({a.batch, a.heads, a.keys + 64, a.width + 64, 8}), ATTENTION_SIZES);
    const auto reaches = [&](int64_t batch, int64_t head, int64_t token, int64_t tokens) {
        return batch >= 0 && head >= 0 && token >= 0 && fits({batch | 1, a.batch, 4}) && fits({head | 1, a.heads, 4}) &&
               fits({token | 1, tokens, 4});
    };
    expect(reaches(a.q_batch, a.q_head, a.q_token, a.rows), ATTENTION_SIZES);
    expect(reaches(a.k_batch, a.k_head, a.k_token, a.keys), ATTENTION_SIZES);
    expect(reaches(a.v_batch, a.v_head, a.v_token, a.keys), ATTENTION_SIZES);
    expect(are_bits(a.bits) && are_bits(a.qk_bits) && are_bits(a.v_bits), ATTENTION_BITS);
    expect(a.fraction_bits >= 0 && a.fraction_bits <= 5 && a.fraction_bits <= a.bits, ATTENTION_BITS);
    expect(a.logit_scale > 0.0f && a.logit_scale < INFINITE, LOGIT_SCALE);
}

template <class Body> static int32_t guarded(const Body& body) {
    try {
        body();
        return NONE;
    } catch (const Refused& refused) {
        return refused.error;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}

}  // namespace dgq

// A call returns 0 or an error (dgq_error) before it has touched any memory. Pointers and sizes that a caller gives are
// taken to belong together: how much memory lies behind a pointer cannot be seen here.
#pragma GCC visibility push(default)
extern "C" {

// Changes with every change of the structures or functions below.
int32_t dgq_abi() { return 14; }

// The sizes of Layer, Stored, Norm and Attention, for callers that describe them once more.
int64_t dgq_struct_bytes(int32_t which) {
    const int64_t sizes[] = {sizeof(dgq::Layer), sizeof(dgq::Stored), sizeof(dgq::Norm), sizeof(dgq::Attention)};
    return which >= 0 && which < 4 ? sizes[which] : 0;
}

const char* dgq_error(int32_t error) {
    return error >= 0 && error < dgq::ERROR_COUNT ? dgq::error_texts[error] : "unknown";
}

int32_t dgq_supported(int32_t isa) { return isa >= 0 && isa < dgq::ISA_COUNT && dgq::supported(isa); }

// Use an instruction set and the host's parallel region (or null: one thread).
int32_t dgq_use(int32_t isa, void* region) {
    if (!dgq_supported(isa)) return dgq::NO_ISA;
    dgq::kernels = &dgq::all_kernels[isa];
    dgq::parallel_region = reinterpret_cast<dgq::ParallelRegion>(region);
    return dgq::NONE;
}

// Of a weight (n, k), in four bits with sub-scales of `group` values, or in eight for 0; 0 where there can be none of such
// sizes.
int64_t dgq_packed_bytes(int64_t n, int64_t k, int64_t group) {
    using namespace dgq;
    if (!fits({n, k}) || k > MOST_K || (group && !are_four_bits(group))) return 0;
    return round_up(n, TILE_COLS) / BLOCK_COLS * (group ? four_bit_bytes(k, group) : block_bytes(k));
}

// A stored weight to the engine's blocks, in four bits for the `group` of a weight in its own order, or in eight for 0;
// its sums over k to column_sum (n,), and the sums of its sizes to size_sum (n,).
int32_t dgq_pack(
    const dgq::Stored* stored, int64_t group, int8_t* packed, int32_t* column_sum, int64_t* size_sum,
    int32_t threads) {
    using namespace dgq;
    return guarded([&] {
        check_call(FLOAT32, threads);
        expect(stored && packed && column_sum && size_sum, NO_POINTER);
        check_stored(*stored);
        const bool same = are_four_bits(group) && group == stored->group && !stored->weight && !stored->order;
        expect(!group || same, GROUP);
        const int64_t n = stored->n, k = stored->k;
        std::vector<uint8_t> ones(round_up(k, K_BLOCK), 1);
        std::fill(ones.begin() + k, ones.end(), 0);  // what stands behind the last value of a group counts for nothing
        parallel(threads, round_up(n, TILE_COLS) / BLOCK_COLS, [&](int64_t block) {
            const int64_t first = block * BLOCK_COLS;
            const int64_t rows = n <= first ? 0 : n - first < BLOCK_COLS ? n - first : BLOCK_COLS;
            if (group) {
                auto* to = reinterpret_cast<uint8_t*>(packed + block * four_bit_bytes(k, group));
                pack_nibbles(*stored, block, to);
                auto* values = panel_scratch().get<int8_t>(block_bytes(k));
                kernels->unpack(to, to + nibble_bytes(k), round_up(k, K_BLOCK) / group, group, values, nullptr);
                const auto sum_to = [&](auto* out) {
                    int32_t sums[GROUP_ROWS * TILE_COLS];
                    kernels->tile(ones.data(), 0, values, 0, k, 1, BLOCK_COLS, ZEROS, 0, sums, TILE_COLS);
                    for (int64_t row = 0; row < rows; ++row) out[first + row] = sums[row];
                };
                sum_to(column_sum);
                to_sizes(values, block_bytes(k));
                sum_to(size_sum);
                return;
            }
            int8_t* values = panel_scratch().get<int8_t>(BLOCK_COLS * k + k + stored->group);
            for (int64_t row = 0; row < rows; ++row) {
                int8_t* out = values + row * k;
                read_stored(*stored, first + row, values + BLOCK_COLS * k, out);
                int32_t sum = 0;
                int64_t size = 0;
                for (int64_t i = 0; i < k; ++i) {
                    sum += out[i];
                    size += out[i] < 0 ? -out[i] : out[i];
                }
                column_sum[first + row] = sum;
                size_sum[first + row] = size;
            }
            pack_rows(values, rows, k, 0, packed + block * block_bytes(k), k);
        });
    });
}

// Blocks [first, first + count) of a layer of four bits to those that eight would have.
int32_t dgq_unpack(const dgq::Layer* layer, int64_t first, int64_t count, int8_t* out, int32_t threads) {
    using namespace dgq;
    return guarded([&] {
        check_call(FLOAT32, threads);
        expect(layer && out, NO_POINTER);
        check_layer(*layer);
        expect(layer->group, GROUP);
        const int64_t k = layer->k, group = layer->group;
        const int64_t blocks = round_up(layer->n, TILE_COLS) / BLOCK_COLS;
        expect(first >= 0 && first <= blocks && count >= 0 && count <= blocks - first, LAYER_SIZES);
        parallel(threads, count, [&](int64_t block) {
            const auto* from = reinterpret_cast<const uint8_t*>(layer->packed) + (first + block) * four_bit_bytes(k, group);
            kernels->unpack(
                from, from + nibble_bytes(k), round_up(k, K_BLOCK) / group, group, out + block * block_bytes(k),
                nullptr);
        });
    });
}

// Whether a layer is one that the functions below take.
int32_t dgq_check_layer(const dgq::Layer* layer) {
    return dgq::guarded([&] { dgq::check_layer(*layer); });
}

// Several layers of the same sizes and bits may share an input: pointers to `count` layers and outputs.
int32_t dgq_linear(
    const dgq::Layer* const* layers, int64_t count, const void* x, int64_t ldx, int64_t m, int32_t dtype,
    const dgq::Norm* norm, const void* residual, int32_t gated, void* const* y, int32_t threads) {
    using namespace dgq;
    return guarded([&] {
        check_call(dtype, threads);
        expect(layers && x && y && count >= 1, NO_POINTER);
        for (int64_t i = 0; i < count; ++i) {
            expect(layers[i] && y[i], NO_POINTER);
            check_layer(*layers[i]);
            const Layer &one = *layers[0], &other = *layers[i];
            const bool same = other.n == one.n && other.k == one.k && other.bits == one.bits &&
                              other.rotation == one.rotation && other.inv_divisor == one.inv_divisor;
            expect(count == 1 || (same && !residual), UNEQUAL);
            expect(other.channels == other.k, NOT_LINEAR);
            expect(other.bits != WIDE_BITS, BITS);
        }
        const int64_t n = layers[0]->n, k = layers[0]->k;
        expect(!gated || (n % TILE_COLS == 0 && !residual), GATE);
        expect(ldx >= 0 && fits({m, ldx | 1, 4}) && fits({m, n, 4}) && fits({m, k}), INPUT_SIZES);
        if (norm) check_norm(*norm, !norm->groups && !norm->silu);
        std::vector<Finish> finishes(count);
        for (int64_t i = 0; i < count; ++i) finishes[i] = {nullptr, residual, gated, y[i]};
        linear(layers, count, x, ldx, m, dtype, norm, finishes.data(), threads);
    });
}

int32_t dgq_conv2d(
    const dgq::Layer* layer, const void* x, int64_t batch, int64_t height, int64_t width, int32_t dtype,
    const dgq::Norm* norm, const float* sample_bias, const void* residual, void* y, int32_t threads) {
    using namespace dgq;
    return guarded([&] {
        check_call(dtype, threads);
        expect(layer && x && y, NO_POINTER);
        check_layer(*layer);
        expect(layer->bits != WIDE_BITS, BITS);
        const int64_t pad = layer->padding, channels = layer->channels;
        expect(fits({batch, height, width}), INPUT_SIZES);
        const int64_t tall = height + 2 * pad, wide = width + 2 * pad;
        expect(tall >= layer->kernel && wide >= layer->kernel, WINDOW);
        expect(fits({batch, tall, wide, channels, 4}) && fits({batch, tall, wide, layer->n, 4}), INPUT_SIZES);
        if (norm) check_norm(*norm, norm->groups >= 1 && channels % norm->groups == 0);
        convolve(*layer, x, batch, height, width, dtype, norm, {sample_bias, residual, 0, y}, threads);
    });
}

// A norm alone: (batch, height, width, channels) to the same, which may be the same memory.
int32_t dgq_group_norm(
    const dgq::Norm* norm, const void* x, int64_t batch, int64_t height, int64_t width, int64_t channels, int32_t dtype,
    void* y, int32_t threads) {
    using namespace dgq;
    return guarded([&] {
        check_call(dtype, threads);
        expect(norm && x && y, NO_POINTER);
        expect(channels >= 1 && channels % BLOCK_COLS == 0 && fits({batch, height, width, channels, 4}), INPUT_SIZES);
        check_norm(*norm, norm->groups >= 1 && channels % norm->groups == 0);
        normalize(*norm, x, batch, height, width, channels, dtype, y, threads);
    });
}

// (batch, height, width, channels) to (batch, 2 height, 2 width, n / 4).
int32_t dgq_upsample(
    const dgq::Layer* layer, const void* x, int64_t batch, int64_t height, int64_t width, int32_t dtype, void* y,
    int32_t threads) {
    using namespace dgq;
    return guarded([&] {
        check_call(dtype, threads);
        expect(layer && x && y, NO_POINTER);
        check_layer(*layer);
        expect(layer->kernel == 2 && layer->stride == 1 && layer->padding == 1, UPSAMPLED);
        expect(layer->n % (4 * BLOCK_COLS) == 0, UPSAMPLED);
        expect(layer->bits != WIDE_BITS || (!layer->inv_divisor && !layer->rotation), UPSAMPLED);
        expect(fits({batch, height, width}), INPUT_SIZES);
        expect(fits({batch, height + 2, width + 2, layer->channels, 8}), INPUT_SIZES);
        expect(fits({batch, height, width, layer->n, 4}), INPUT_SIZES);
        upsample(*layer, x, batch, height, width, dtype, y, threads);
    });
}

int32_t dgq_attention(const dgq::Attention* attention, int32_t threads) {
    using namespace dgq;
    return guarded([&] {
        expect(attention, NO_POINTER);
        check_call(attention->dtype, threads);
        check_attention(*attention);
        attend(*attention, threads);
    });
}

// weight_rounding/__init__.py; rows of values, pull and ahead lie values_row, pull_row and ahead_row floats apart.
int32_t dgq_round_columns(
    float* values, int64_t values_row, const float* pull, int64_t pull_row, const float* ahead, int64_t ahead_row,
    const float* diagonal, const float* step, float* change, int64_t rows, int64_t columns, float low, float high,
    int32_t threads) {
    using namespace dgq;
    return guarded([&] {
        check_call(FLOAT32, threads);
        expect(values && pull && ahead && diagonal && step && change, NO_POINTER);
        expect(columns >= 1 && columns <= MOST_COLUMNS && values_row >= columns && pull_row >= columns, BLOCK_SIZES);
        expect(ahead_row >= columns && fits({rows, values_row, 4}) && fits({rows, pull_row, 4}), BLOCK_SIZES);
        expect(fits({columns, ahead_row, 4}), BLOCK_SIZES);
        const Columns job{values, pull, ahead, diagonal, step, change, rows, columns, values_row, pull_row, ahead_row,
                          low, high};
        // a task is a few rows: waking the threads costs more than rounding one
        constexpr int64_t rows_of_task = 64;
        parallel(threads, ceil_div(rows, rows_of_task), [&](int64_t task) {
            const int64_t end = (task + 1) * rows_of_task < rows ? (task + 1) * rows_of_task : rows;
            for (int64_t first = task * rows_of_task; first < end; first += 16) kernels->round_columns(job, first);
        });
    });
}

// weight_rounding/__init__.py; rows of values lie values_row floats apart.
int32_t dgq_search_subscales(
    const float* values, int64_t values_row, const float* importance, const float* scale, uint8_t* best, float* error,
    int64_t rows, int64_t groups, int64_t size, int32_t threads) {
    using namespace dgq;
    return guarded([&] {
        check_call(FLOAT32, threads);
        expect(values && importance && scale && best && error, NO_POINTER);
        expect(size >= 1 && size <= MOST_COLUMNS && fits({groups, size, 4}), BLOCK_SIZES);
        expect(values_row >= groups * size && fits({rows, values_row, 4}), BLOCK_SIZES);
        const Groups job{values, importance, scale, best, error, rows, groups, size, values_row};
        const int64_t rows_of_task = ceil_div(256, groups);
        parallel(threads, ceil_div(rows, rows_of_task), [&](int64_t task) {
            const int64_t end = (task + 1) * rows_of_task < rows ? (task + 1) * rows_of_task : rows;
            for (int64_t row = task * rows_of_task; row < end; ++row) kernels->search_subscales(job, row);
        });
    });
}
}  // extern "C"
#pragma GCC visibility pop
