// Vectors of floats, and the number formats that weights and caches are stored in.
//
// Products are added with fma(), not with * and +, which a compiler may contract differently in each copy of a loop: a
// token's results shall not depend on how many others are computed with it.
//
// "Split order": of every 2 * W elements, first those with even indices, then those with odd ones. Pairs of bfloat16
// and of 4-bit numbers come apart in this order without a shuffle.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

// Loops whose variables index arrays that are to become registers.
#define LLAMA_TP_UNROLL _Pragma("GCC unroll 8")

namespace llama_tp {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define LLAMA_TP_AVX512
constexpr int W = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int W = 8;
#else
#error "needs AVX2, FMA and F16C"
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint8_t vb __attribute__((vector_size(W * 4)));

template <class V, class T>
inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}

template <class T, class V>
inline void store(T* to, V v) {
    std::memcpy(to, &v, sizeof(V));
}

#if defined(LLAMA_TP_AVX512)
inline vf splat(float value) { return _mm512_set1_ps(value); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
// The first numbers of a vector, then zeros.
inline vf first_floats(const float* from, int count) { return _mm512_maskz_loadu_ps((1u << count) - 1, from); }
inline vu first_pairs(const uint16_t* from, int count) {
    return (vu)_mm512_maskz_loadu_epi16(uint32_t((1ull << count) - 1), from);
}
inline void store_first(float* to, int count, vf numbers) { _mm512_mask_storeu_ps(to, (1u << count) - 1, numbers); }
inline vf first_halves(const uint16_t* from, int count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(uint16_t((1u << count) - 1), from));
}
inline vf to_float(vi numbers) { return _mm512_cvtepi32_ps((__m512i)numbers); }
inline vi signed_bytes(const int8_t* from) { return (vi)_mm512_cvtepi8_epi32(load<__m128i>(from)); }
inline vi bytes(const uint8_t* from) { return (vi)_mm512_cvtepu8_epi32(load<__m128i>(from)); }
// The even and the odd ones of 2 * W numbers.
inline void split(vf a, vf b, vf& even, vf& odd) {
    const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odds = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const vf e = _mm512_permutex2var_ps(a, evens, b), o = _mm512_permutex2var_ps(a, odds, b);
    even = e;
    odd = o;
}
// The inverse.
inline void interleave(vf even, vf odd, vf& a, vf& b) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    const vf l = _mm512_permutex2var_ps(even, low, odd), h = _mm512_permutex2var_ps(even, high, odd);
    a = l;
    b = h;
}
// Elements first + lane / lanes of a vector.
template <int first, int lanes>
inline vf spread(vf v) {
    const auto at = [](int lane) { return first + lane / lanes; };
    return _mm512_permutexvar_ps(_mm512_set_epi32(at(15), at(14), at(13), at(12), at(11), at(10), at(9), at(8), at(7),
                                                  at(6), at(5), at(4), at(3), at(2), at(1), at(0)),
                                 v);
}
// Integers of -128 .. 127, as bytes.
inline void store_bytes(uint8_t* to, vf integers) { store(to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(integers))); }
// The first bytes of a vector, then zeros.
inline vb first_bytes(const void* from, int count) {
    return (vb)_mm512_maskz_loadu_epi8(count < 64 ? (1ull << count) - 1 : ~0ull, from);
}
inline vf maximum(vf a, vf b) { return _mm512_max_ps(a, b); }
inline float sum(vf v) { return _mm512_reduce_add_ps(v); }
inline float largest(vf v) { return _mm512_reduce_max_ps(v); }

// The sums of four vectors. Each is added up in the same order.
inline __m128 sum4(vf a, vf b, vf c, vf d) {
    const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512 abcd =
        (__m512)(_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd)) + (__m512)(_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
    const __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
    return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}
#else
inline vf splat(float value) { return _mm256_set1_ps(value); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
// The first numbers of a vector, then zeros.
inline vf first_floats(const float* from, int count) {
    vf v{};
    std::memcpy(&v, from, count * sizeof(float));
    return v;
}
inline vu first_pairs(const uint16_t* from, int count) {
    vu v{};
    std::memcpy(&v, from, count * sizeof(uint16_t));
    return v;
}
inline void store_first(float* to, int count, vf numbers) { std::memcpy(to, &numbers, count * sizeof(float)); }
inline vf first_halves(const uint16_t* from, int count) {
    if (count == W) return _mm256_cvtph_ps(load<__m128i>(from));
    uint16_t part[W] = {};
    for (int i = 0; i < count; ++i) part[i] = from[i];
    return _mm256_cvtph_ps(load<__m128i>(part));
}
inline vf to_float(vi numbers) { return _mm256_cvtepi32_ps((__m256i)numbers); }
inline vi signed_bytes(const int8_t* from) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
inline vi bytes(const uint8_t* from) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
// The even and the odd ones of 2 * W numbers.
inline void split(vf a, vf b, vf& even, vf& odd) {
    const __m256 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    even = _mm256_shuffle_ps(low, high, 0x88);  // a0 a2 a4 a6 | b0 b2 b4 b6
    odd = _mm256_shuffle_ps(low, high, 0xdd);
}
// The inverse.
inline void interleave(vf even, vf odd, vf& a, vf& b) {
    const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    a = _mm256_permute2f128_ps(low, high, 0x20);
    b = _mm256_permute2f128_ps(low, high, 0x31);
}
// Elements first + lane / lanes of a vector.
template <int first, int lanes>
inline vf spread(vf v) {
    const auto at = [](int lane) { return first + lane / lanes; };
    return _mm256_permutevar8x32_ps(v, _mm256_set_epi32(at(7), at(6), at(5), at(4), at(3), at(2), at(1), at(0)));
}
// Integers of -128 .. 127, as bytes.
inline void store_bytes(uint8_t* to, vf integers) {
    const __m256i wide = _mm256_cvtps_epi32(integers);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(words, words));
}
// The first bytes of a vector, then zeros.
inline vb first_bytes(const void* from, int count) {
    vb v{};
    std::memcpy(&v, from, count);
    return v;
}
inline vf maximum(vf a, vf b) { return _mm256_max_ps(a, b); }

inline __m128 sum4(vf a, vf b, vf c, vf d) {
    const __m256 ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
    const __m256 cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
    const __m256 abcd =
        (__m256)(_mm256_unpacklo_pd((__m256d)ab, (__m256d)cd)) + (__m256)(_mm256_unpackhi_pd((__m256d)ab, (__m256d)cd));
    return _mm256_castps256_ps128(abcd) + _mm256_extractf128_ps(abcd, 1);
}

inline float sum(vf v) { return _mm_cvtss_f32(sum4(v, v, v, v)); }

inline float largest(vf v) {
    float most = v[0];
    for (int lane = 1; lane < W; ++lane) most = std::fmax(most, v[lane]);
    return most;
}
#endif

// sum + u s of four pairs of bytes for each lane; u unsigned, s signed.
#if defined(LLAMA_TP_AVX512) && defined(__AVX512VNNI__)
constexpr int kLargestByte = 255;  // of u
inline vi add_products(vi sum, vb u, vb s) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s); }
#elif defined(LLAMA_TP_AVX512)
constexpr int kLargestByte = 128;  // else a sum of two products does not fit 16 bits
inline vi add_products(vi sum, vb u, vb s) {
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)u, (__m512i)s);
    return sum + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif defined(__AVXVNNI__)
constexpr int kLargestByte = 255;
inline vi add_products(vi sum, vb u, vb s) { return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)u, (__m256i)s); }
#else
constexpr int kLargestByte = 128;
inline vi add_products(vi sum, vb u, vb s) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)u, (__m256i)s);
    return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#endif

// The nearest integers; |x| < 2^22.
inline vf rounded(vf x) { return x + 12582912.0f - 12582912.0f; }
inline vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// NaN and infinities become 0.
inline vf finite_or_zero(vf x) { return (vf)((vi)x & ((vf)((vi)x & 0x7fffffff) < HUGE_VALF)); }

// bfloat16: the upper half of a float.
inline vf even_bf16(vu pairs) { return (vf)(pairs << 16); }
inline vf odd_bf16(vu pairs) { return (vf)(pairs & 0xffff0000u); }

// The first `count` of 2 * W stored numbers as floats, then zeros: in their order, bfloat16 in split order.
inline void load_stored(const float* from, int count, vf& a, vf& b) {
    if (count == 2 * W) {
        a = load<vf>(from);
        b = load<vf>(from + W);
    } else {
        a = first_floats(from, count < W ? count : W);
        b = first_floats(from + W, count > W ? count - W : 0);
    }
}

inline void load_stored(const uint16_t* from, int count, vf& a, vf& b) {
    const vu pairs = count == 2 * W ? load<vu>(from) : first_pairs(from, count);
    a = even_bf16(pairs);
    b = odd_bf16(pairs);
}

inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);  // NaN
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void store_bf16(uint16_t* to, vf a, vf b) {
#if defined(__AVX512BF16__)
    store(to, _mm512_cvtne2ps_pbh(b, a));
#else
    for (int i = 0; i < W; ++i) to[i] = to_bf16(a[i]);
    for (int i = 0; i < W; ++i) to[W + i] = to_bf16(b[i]);
#endif
}

// The first numbers of a vector, in their order.
inline void store_first_bf16(uint16_t* to, int count, vf numbers) {
#if defined(__AVX512BF16__)
    _mm256_mask_storeu_epi16(to, uint16_t((1u << count) - 1), (__m256i)_mm512_cvtneps_pbh(numbers));
#else
    for (int i = 0; i < count; ++i) to[i] = to_bf16(numbers[i]);
#endif
}

// e^x to 2e-7; x is limited to -87 .. 88, so that a result is never 0 or infinite.
inline vf exponential(vf x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    const vf rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf shifted = x * 1.44269504f + rounder;
    const vf n = shifted - rounder;
    const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (vf)(((vi)shifted - 0x4b400000 + 127) << 23);
}

constexpr int kLine = 64;  // bytes of a cache line

// Bring a line into the cache. Assembly, since GCC drops calls of functions that only prefetch.
inline void fetch(const void* from) { asm volatile("prefetcht0 %0" : : "m"(*(const char*)from)); }

inline void fetch(const void* from, int64_t num_bytes) {
    for (int64_t at = 0; at < num_bytes; at += kLine) fetch((const char*)from + at);
}

// Memory of vectors. Loading one from two lines takes twice as long.
template <class T>
struct LineAllocator {
    using value_type = T;
    LineAllocator() = default;
    template <class U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(kLine))); }
    void deallocate(T* numbers, size_t) { ::operator delete(numbers, std::align_val_t(kLine)); }
    template <class U>
    bool operator==(const LineAllocator<U>&) const {
        return true;
    }
};

template <class T>
using Buffer = std::vector<T, LineAllocator<T>>;

inline int round_up(int64_t value, int step) { return int((value + step - 1) / step * step); }

}  // namespace llama_tp
