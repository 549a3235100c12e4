// Runs the CPU engine on made-up layers and attentions, on every instruction set of the machine, and prints a hash of each
// result: "isa case hash". Lines of one case are equal on every instruction set, compiler and machine. Needs no Python, so
// that an emulator can run it (tests/kernels/test_native_machines.py).
#include "../../kernels/dgq_kernels/native/engine.cpp"

#include <cstdio>
#include <string>

namespace {
using dgq::Layer;
const char* const isas[] = {"portable", "avx2", "avx-vnni", "avx512", "avx512-vnni", "avx512-vbmi", "amx", "neon-dot", "neon-i8mm"};
static_assert(sizeof isas / sizeof *isas == dgq::ISA_COUNT, "a name for every instruction set");

uint64_t seed = 0;
uint32_t draw() {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(seed >> 32);
}
float uniform(float low, float high) { return low + (high - low) * static_cast<float>(draw() >> 8) / 16777216.0f; }

std::vector<float> floats(int64_t count, float low, float high) {
    std::vector<float> values(count);
    for (float& value : values) value = uniform(low, high);
    return values;
}

// Values in one of the engine's types; of different sizes, some zero, and one not finite where asked for.
struct Values {
    std::vector<float> wide;
    std::vector<uint16_t> half;
    const void* at(int dtype) const { return dtype == dgq::FLOAT32 ? static_cast<const void*>(wide.data()) : half.data(); }
};
Values values(int64_t count, float spread, bool broken = false) {
    Values made{floats(count, -1.0f, 1.0f), std::vector<uint16_t>(count)};
    for (int64_t i = 0; i < count; ++i) {
        if (i % 37 == 5) made.wide[i] = 0.0f;
        if (i % 11 == 3) made.wide[i] *= spread;
        if (broken && i == count / 2) made.wide[i] = dgq::NOT_A_NUMBER;
        if (broken && i == count / 3) made.wide[i] = -dgq::INFINITE;
        uint32_t bits;
        std::memcpy(&bits, &made.wide[i], 4);
        made.half[i] = static_cast<uint16_t>(bits >> 16);
    }
    return made;
}

// NaN counts as one value: which of its bits an operation sets is the machine's.
struct Hash {
    uint64_t state = 14695981039346656037u;
    void add(uint32_t word) { state = (state ^ word) * 1099511628211u; }
    void add(const std::vector<char>& bytes, int dtype) {
        const size_t size = dtype == dgq::FLOAT32 ? 4 : 2;
        for (size_t i = 0; i < bytes.size(); i += size) {
            uint32_t word = 0;
            std::memcpy(reinterpret_cast<char*>(&word) + 4 - size, bytes.data() + i, size);
            add((word & INT32_MAX) > 0x7f800000u ? 0x7fc00000u : word);
        }
    }
};

int failures = 0;
void must(int32_t error, const std::string& name) {
    if (!error) return;
    std::fprintf(stderr, "%s: %s\n", name.c_str(), dgq_error(error));
    ++failures;
}
void report(int isa, const std::string& name, const Hash& hash) {
    std::printf("%s %s %016llx\n", isas[isa], name.c_str(), static_cast<unsigned long long>(hash.state));
}

// A layer and what it points to. The weight is int8, or two-level int4 in another order of the channels.
struct Made {
    std::vector<int8_t> packed, weight;
    std::vector<uint8_t> nibbles, subscales;
    std::vector<int32_t> column_sum, order;
    std::vector<int64_t> sizes;
    std::vector<float> scale, bias, divisor;
    Layer layer;

    Made(int64_t n, int64_t channels, int bits, int kernel, int stride, int padding, bool two_level, bool divided) {
        const int64_t k = channels * kernel * kernel, group = 32, groups = (k + group - 1) / group;
        dgq::Stored stored{nullptr, nullptr, nullptr, nullptr, n, k, channels, group};
        if (two_level) {
            nibbles.resize(n * groups * group / 2);
            subscales.resize(n * ((groups + 1) / 2));
            for (auto* bytes : {&nibbles, &subscales})
                for (uint8_t& byte : *bytes) byte = static_cast<uint8_t>(draw());
            for (int64_t i = 0; i < channels; ++i) order.push_back(static_cast<int32_t>((i + 1) % channels));
            stored.packed = nibbles.data(), stored.subscales = subscales.data();
            if (divided) stored.order = order.data();
        } else {
            weight.resize(n * k);
            for (int8_t& value : weight) value = static_cast<int8_t>(draw());
            for (int64_t i = 0; i < k; ++i) weight[i] = -128;  // one column at the end of its range
            stored.weight = weight.data();
        }
        const int32_t kept = two_level && !divided ? group : 0;  // packed in four bits
        packed.resize(dgq_packed_bytes(n, k, kept));
        column_sum.resize(n), sizes.resize(n);
        must(dgq_pack(&stored, kept, packed.data(), column_sum.data(), sizes.data(), 1), "pack");
        scale = floats(n, 0.1f, 1.1f), bias = floats(n, -9.0f, 9.0f), divisor = floats(channels, 0.5f, 1.5f);
        for (float& value : scale) value /= static_cast<float>(k);
        layer = {packed.data(), scale.data(), column_sum.data(), bias.data(), divided ? divisor.data() : nullptr,
                 n, k, channels, bits, kernel, stride, padding, 0, kept};
    }
    Hash hash() const {
        Hash hash;
        for (const int32_t sum : column_sum) hash.add(static_cast<uint32_t>(sum));
        for (const int8_t byte : packed) hash.add(static_cast<uint8_t>(byte));
        return hash;
    }
};

void linear(int isa, int64_t m, int64_t k, int64_t n, int bits, int form) {
    const bool gated = form == 1, normed = form == 2 || form == 1, divided = form == 3, broken = form == 4;
    const Made made(n, k, bits, 1, 1, 0, form % 2, divided);
    const int64_t out = gated ? n / 2 : n;
    const Values x = values(m * k, 20.0f, broken), residual = values(m * n, 3.0f);
    const auto gain = floats(k, 0.5f, 1.5f), shift = floats(k, -1.0f, 1.0f);
    const dgq::Norm norm{gain.data(), shift.data(), 1e-5f, 0, 0};
    Hash hash = made.hash();
    for (const int dtype : {dgq::FLOAT32, dgq::BFLOAT16}) {
        std::vector<char> y(m * out * (dtype == dgq::FLOAT32 ? 4 : 2));
        const Layer* layers[] = {&made.layer};
        void* outputs[] = {y.data()};
        const void* added = gated || form == 0 ? nullptr : residual.at(dtype);
        must(dgq_linear(layers, 1, x.at(dtype), k, m, dtype, normed ? &norm : nullptr, added, gated, outputs, 1), "linear");
        hash.add(y, dtype);
    }
    const auto number = [](int64_t value) { return std::to_string(value); };
    report(isa, "linear-" + number(m) + "x" + number(k) + "x" + number(n) + "-" + number(bits) + "-" + number(form), hash);
}

void conv(int isa, int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t n, int kernel, int stride,
          int padding, int form) {
    const bool normed = form == 1, divided = form == 2, broken = form == 3;
    const Made made(n, channels, 8, kernel, stride, padding, form % 2, divided);
    const int64_t tall = (height + 2 * padding - kernel) / stride + 1, wide = (width + 2 * padding - kernel) / stride + 1;
    const Values x = values(batch * height * width * channels, 9.0f, broken), residual = values(batch * tall * wide * n, 2.0f);
    const auto gain = floats(channels, 0.5f, 1.5f), shift = floats(channels, -1.0f, 1.0f), each = floats(batch * n, -5.0f, 5.0f);
    Hash hash = made.hash();
    for (const int dtype : {dgq::FLOAT32, dgq::BFLOAT16})
        for (const int silu : {0, 1}) {
            const dgq::Norm norm{gain.data(), shift.data(), 1e-5f, static_cast<int32_t>(channels % 4 ? 1 : 4), silu};
            std::vector<char> y(batch * tall * wide * n * (dtype == dgq::FLOAT32 ? 4 : 2));
            must(dgq_conv2d(&made.layer, x.at(dtype), batch, height, width, dtype, normed ? &norm : nullptr,
                            silu ? each.data() : nullptr, silu ? residual.at(dtype) : nullptr, y.data(), 1),
                 "conv2d");
            hash.add(y, dtype);
        }
    report(isa, "conv2d-" + std::to_string(channels) + "x" + std::to_string(height) + "x" + std::to_string(width) + "-" +
                    std::to_string(kernel) + "-" + std::to_string(stride) + "-" + std::to_string(form), hash);
}

// Codes of 16 bits, of 8 with a weight of four, divided and rotated, or not finite.
void upsample(int isa, int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t n, int form) {
    const bool wide = form == 0, divided = form == 2, broken = form == 3;
    Made made(4 * n, channels, wide ? dgq::WIDE_BITS : 8, 2, 1, 1, form % 2, divided);
    if (divided && channels % 16 == 0) made.layer.rotation = 16;
    const Values x = values(batch * height * width * channels, 9.0f, broken);
    Hash hash = made.hash();
    for (const int dtype : {dgq::FLOAT32, dgq::BFLOAT16}) {
        std::vector<char> y(batch * 4 * height * width * n * (dtype == dgq::FLOAT32 ? 4 : 2));
        must(dgq_upsample(&made.layer, x.at(dtype), batch, height, width, dtype, y.data(), 1), "upsample");
        hash.add(y, dtype);
    }
    report(isa, "upsample-" + std::to_string(channels) + "x" + std::to_string(height) + "x" + std::to_string(width) + "-" +
                    std::to_string(form), hash);
}

void group_norm(int isa, int64_t batch, int64_t channels, int64_t height, int64_t width, bool broken) {
    const Values x = values(batch * height * width * channels, 9.0f, broken);
    const auto gain = floats(channels, 0.5f, 1.5f), shift = floats(channels, -1.0f, 1.0f);
    Hash hash;
    for (const int dtype : {dgq::FLOAT32, dgq::BFLOAT16})
        for (const int silu : {0, 1}) {
            const dgq::Norm norm{gain.data(), shift.data(), 1e-5f, 4, silu};
            std::vector<char> y(batch * height * width * channels * (dtype == dgq::FLOAT32 ? 4 : 2));
            must(dgq_group_norm(&norm, x.at(dtype), batch, height, width, channels, dtype, y.data(), 1), "group_norm");
            hash.add(y, dtype);
        }
    report(isa, "group_norm-" + std::to_string(channels) + "x" + std::to_string(height) + "x" + std::to_string(width) +
                    (broken ? "-broken" : ""), hash);
}

// Pairs of a query and a block of keys that attention multiplied, and that there were.
int64_t lived = 0, pairs = 0;
const dgq::Kernels* counted = nullptr;
void counting_values(const uint8_t* a, ptrdiff_t lda, const int8_t* b, ptrdiff_t b_stride, int64_t k, int rows, int64_t cols,
                     const uint32_t* live, int32_t* c, ptrdiff_t ldc) {
    for (int64_t block = 0; block < dgq::ceil_div(k, dgq::KEY_BLOCK); ++block, pairs += rows)
        lived += __builtin_popcount(live[block]);
    counted->values(a, lda, b, b_stride, k, rows, cols, live, c, ldc);
}

// What no query of a block of keys lives in is not multiplied: probabilities that are not zero there show it.
void values_passed_over(int isa, int64_t rows, int64_t keys, int64_t width) {
    const int64_t lda = dgq::row_stride(keys), ldc = dgq::round_up(width, dgq::TILE_COLS), count = dgq::ceil_div(keys, dgq::KEY_BLOCK);
    std::vector<uint8_t> p(dgq::TILE_ROWS * lda, 0);
    std::vector<int8_t> v(dgq::round_up(width, dgq::TILE_COLS) / dgq::BLOCK_COLS * dgq::block_bytes(keys));
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t key = 0; key < keys; ++key) p[row * lda + key] = static_cast<uint8_t>(draw());
    for (int8_t& value : v) value = static_cast<int8_t>(draw());
    std::vector<uint32_t> live(count);
    for (int64_t block = 0; block < count; ++block) live[block] = block % 3 == 1 ? 0 : static_cast<uint32_t>((1ull << rows) - 1);
    Hash hash;
    std::vector<int32_t> sums(dgq::TILE_ROWS * ldc, -1);
    std::vector<int8_t> packed = v;
    if (dgq::kernels->pairs && dgq::half_full(width))
        dgq::pair_quads(keys, packed.data() + width / dgq::BLOCK_COLS * dgq::block_bytes(keys));
    dgq::kernels->thread_begin();
    dgq::kernels->values(p.data(), lda, packed.data(), dgq::block_bytes(keys), keys, static_cast<int>(rows), width, live.data(),
                         sums.data(), ldc);
    dgq::kernels->thread_end();
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t col = 0; col < width; ++col) {
            int32_t sum = 0;
            for (int64_t key = 0; key < keys; ++key)
                if (live[key / dgq::KEY_BLOCK])
                    sum += p[row * lda + key] * v[col / 16 * dgq::block_bytes(keys) + key / 4 * 64 + col % 16 * 4 + key % 4];
            if (sum != sums[row * ldc + col]) {
                std::fprintf(stderr, "%s: values %lld %lld\n", isas[isa], static_cast<long long>(row), static_cast<long long>(col));
                ++failures;
            }
            hash.add(static_cast<uint32_t>(sum));
        }
    report(isa, "values-" + std::to_string(rows) + "x" + std::to_string(keys) + "x" + std::to_string(width), hash);
}

void attention(int isa, int64_t rows, int64_t keys, int64_t width, int bits, int fraction_bits, int start, bool broken,
               float peak = 1.0f) {
    const int64_t batch = 2, heads = 2;
    const Values q = values(batch * rows * heads * width, 4.0f * peak), k = values(batch * keys * heads * width, 4.0f, broken);
    const Values v = values(batch * keys * heads * width, 2.0f);
    Hash hash;
    counted = dgq::kernels, lived = pairs = 0;
    dgq::Kernels counting = *counted;
    counting.values = counting_values;
    dgq::kernels = &counting;
    for (const int dtype : {dgq::FLOAT32, dgq::BFLOAT16}) {
        std::vector<char> out(batch * rows * heads * width * (dtype == dgq::FLOAT32 ? 4 : 2));
        const dgq::Attention job{
            q.at(dtype), k.at(dtype), v.at(dtype), out.data(), rows * heads * width, width, heads * width,
            keys * heads * width, width, heads * width, keys * heads * width, width, heads * width, batch, heads, rows,
            keys, width, 0.7f, bits, fraction_bits, start, 8, 7, dtype};
        must(dgq_attention(&job, 1), "attention");
        hash.add(out, dtype);
    }
    dgq::kernels = counted;
    report(isa, "attention-" + std::to_string(rows) + "x" + std::to_string(keys) + "x" + std::to_string(width) + "-" +
                    std::to_string(bits) + "-" + std::to_string(fraction_bits) + "-" + std::to_string(start) +
                    (broken ? "-broken" : "") + "-lived-" + std::to_string(lived) + "-of-" + std::to_string(pairs), hash);
}

void all(int isa) {
    seed = 1;
    for (int form = 0; form < 5; ++form) {
        linear(isa, 1, 7, 32, 8, form);
        linear(isa, 6, 42, 96, 4, form);
        linear(isa, 33, 131, 64, 8, form);
        linear(isa, 77, 320, 160, 6, form);
    }
    for (int m = 2; m < 20; ++m) linear(isa, m, 64 + m, 48 + m, 8, 0);
    linear(isa, 3, 16510, 33, 8, 0);  // long sums of full size
    for (int form = 0; form < 4; ++form) {
        conv(isa, 2, 32, 8, 8, 48, 3, 1, 1, form);
        conv(isa, 1, 5, 7, 9, 3, 3, 2, 1, form);
        conv(isa, 2, 20, 9, 6, 40, 5, 1, 2, form);
        conv(isa, 2, 64, 3, 16, 33, 3, 1, 1, form);  // in place
        conv(isa, 1, 64, 4, 32, 16, 1, 1, 0, form);
        upsample(isa, 2, 20, 7, 5, 16, form);
        upsample(isa, 3, 64, 5, 16, 48, form);  // in place
    }
    for (const bool broken : {false, true}) {
        group_norm(isa, 2, 48, 5, 7, broken);
        group_norm(isa, 1, 4112, 2, 3, broken);  // a pixel is more than a piece
        attention(isa, 64, 64, 32, 8, 4, 0, broken);
        attention(isa, 33, 77, 40, 6, 3, 1, broken);
        attention(isa, 50, 131, 160, 8, 5, 1, broken);
        attention(isa, 5, 2, 16, 4, 0, 1, broken);
        attention(isa, 40, 333, 24, 8, 4, 0, broken);
    }
    for (const float peak : {30.0f, 300.0f, 1e6f}) {
        attention(isa, 45, 1000, 40, 8, 4, 0, false, peak);
        attention(isa, 31, 640, 80, 6, 3, 1, false, peak);
        attention(isa, 33, 300, 300, 8, 5, 0, false, peak);  // logits too large for logit_base
    }
    values_passed_over(isa, 32, 1000, 40);
    values_passed_over(isa, 19, 1111, 16);
    values_passed_over(isa, 5, 260, 160);
    for (const int64_t width : {3, 24, 56, 72}) values_passed_over(isa, 18, 1021, width);  // the last block is half full
}
}  // namespace

// An argument is the size in bytes that panels of rows may have, in place of what the cache of the machine gives.
int main(int count, char** arguments) {
    if (count > 1) dgq::panel_bytes = std::atoll(arguments[1]);
    for (int isa = 0; isa < dgq::ISA_COUNT; ++isa)
        if (dgq_use(isa, nullptr) == dgq::NONE) all(isa);
    return failures != 0;
}
