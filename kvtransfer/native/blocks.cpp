// Copies of scattered blocks and their digests. Called through ctypes by kernel.py, which owns every buffer.
//
// A row is one block, [segments][segment_bytes]; row r of a matrix starts at base + r * row_bytes. Sizes are in
// bytes, alignment is none. The digest is XXH3_64bits_withSeed, written after its specification
// (github.com/Cyan4973/xxHash, doc/xxhash_spec.md), so that it equals what every xxhash library gives.

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "little-endian machines only: elsewhere the fallback does the work"
#endif

namespace {

using u8 = uint8_t;
using u32 = uint32_t;
using u64 = uint64_t;

constexpr u64 kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr u64 kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F;
constexpr u64 kPrime64_3 = 0x165667B19E3779F9, kPrime64_4 = 0x85EBCA77C2B2AE63;
constexpr u64 kPrime64_5 = 0x27D4EB2F165667C5;
constexpr u64 kMix1 = 0x165667919E3779F9, kMix2 = 0x9FB21C651E98DF25;

constexpr size_t kSecretBytes = 192, kStripe = 64, kStripesPerRound = (kSecretBytes - kStripe) / 8;

constexpr u8 kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

inline u32 read32(const u8* at) { u32 v; memcpy(&v, at, 4); return v; }
inline u64 read64(const u8* at) { u64 v; memcpy(&v, at, 8); return v; }
inline u64 rotated(u64 v, int by) { return (v << by) | (v >> (64 - by)); }

inline u64 folded_product(u64 a, u64 b) {
  unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<u64>(product) ^ static_cast<u64>(product >> 64);
}

inline u64 avalanche(u64 h) {
  h = (h ^ (h >> 37)) * kMix1;
  return h ^ (h >> 32);
}

inline u64 avalanche_of_64(u64 h) {
  h = (h ^ (h >> 33)) * kPrime64_2;
  h = (h ^ (h >> 29)) * kPrime64_3;
  return h ^ (h >> 32);
}

inline u64 mixed(const u8* in, const u8* secret, u64 seed) {
  return folded_product(read64(in) ^ (read64(secret) + seed), read64(in + 8) ^ (read64(secret + 8) - seed));
}

u64 digest_to_16(const u8* in, size_t n, u64 seed) {
  if (n > 8) {
    u64 low = read64(in) ^ ((read64(kSecret + 24) ^ read64(kSecret + 32)) + seed);
    u64 high = read64(in + n - 8) ^ ((read64(kSecret + 40) ^ read64(kSecret + 48)) - seed);
    return avalanche(n + __builtin_bswap64(low) + high + folded_product(low, high));
  }
  if (n >= 4) {
    seed ^= static_cast<u64>(__builtin_bswap32(static_cast<u32>(seed))) << 32;
    u64 word = read32(in + n - 4) + (static_cast<u64>(read32(in)) << 32);
    u64 h = word ^ ((read64(kSecret + 8) ^ read64(kSecret + 16)) - seed);
    h ^= rotated(h, 49) ^ rotated(h, 24);
    h *= kMix2;
    h = (h ^ ((h >> 35) + n)) * kMix2;
    return h ^ (h >> 28);
  }
  if (n > 0) {
    u32 word = (static_cast<u32>(in[0]) << 16) | (static_cast<u32>(in[n >> 1]) << 24) | in[n - 1] |
               (static_cast<u32>(n) << 8);
    return avalanche_of_64(word ^ ((read32(kSecret) ^ read32(kSecret + 4)) + seed));
  }
  return avalanche_of_64(seed ^ read64(kSecret + 56) ^ read64(kSecret + 64));
}

u64 digest_to_128(const u8* in, size_t n, u64 seed) {
  u64 sum = n * kPrime64_1;
  for (size_t i = (n - 1) / 32 + 1; i-- > 0;) {
    sum += mixed(in + 16 * i, kSecret + 32 * i, seed);
    sum += mixed(in + n - 16 * (i + 1), kSecret + 32 * i + 16, seed);
  }
  return avalanche(sum);
}

u64 digest_to_240(const u8* in, size_t n, u64 seed) {
  u64 sum = n * kPrime64_1;
  for (size_t i = 0; i < 8; ++i) sum += mixed(in + 16 * i, kSecret + 16 * i, seed);
  sum = avalanche(sum);
  for (size_t i = 8; i < n / 16; ++i) sum += mixed(in + 16 * i, kSecret + 16 * (i - 8) + 3, seed);
  return avalanche(sum + mixed(in + n - 16, kSecret + 136 - 17, seed));
}

// The eight 64-bit lanes of the long form. A key is secret words plus and minus the seed in turn: added in
// registers, because a secret just written to memory would wait for every store before it.
struct Lanes {
#if defined(__AVX2__)
  __m256i half[2];

  explicit Lanes(const u64* start) {
    half[0] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start));
    half[1] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start + 4));
  }
  static inline __m256i key(const u8* secret, int i, u64 seed) {
    const long long plus = static_cast<long long>(seed), minus = static_cast<long long>(0 - seed);
    __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret) + i);
    return _mm256_add_epi64(words, _mm256_setr_epi64x(plus, minus, plus, minus));
  }
  inline void add(const u8* in, const u8* secret, u64 seed) {
    for (int i = 0; i < 2; ++i) {
      __m256i data = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in) + i);
      __m256i keyed = _mm256_xor_si256(data, key(secret, i, seed));
      __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
      __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
      half[i] = _mm256_add_epi64(product, _mm256_add_epi64(half[i], swapped));
    }
  }
  inline void scramble(const u8* secret, u64 seed) {
    const __m256i prime = _mm256_set1_epi32(static_cast<int>(kPrime32_1));
    for (int i = 0; i < 2; ++i) {
      __m256i v = _mm256_xor_si256(half[i], _mm256_srli_epi64(half[i], 47));
      v = _mm256_xor_si256(v, key(secret, i, seed));
      __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), prime);
      half[i] = _mm256_add_epi64(_mm256_mul_epu32(v, prime), _mm256_slli_epi64(high, 32));
    }
  }
  void store(u64* out) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4), half[1]);
  }
#else
  u64 lane[8];

  explicit Lanes(const u64* start) { memcpy(lane, start, sizeof lane); }
  static inline u64 key(const u8* secret, int i, u64 seed) {
    return read64(secret + 8 * i) + (i % 2 == 0 ? seed : 0 - seed);
  }
  inline void add(const u8* in, const u8* secret, u64 seed) {
    for (int i = 0; i < 8; ++i) {
      u64 data = read64(in + 8 * i), keyed = data ^ key(secret, i, seed);
      lane[i ^ 1] += data;
      lane[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
    }
  }
  inline void scramble(const u8* secret, u64 seed) {
    for (int i = 0; i < 8; ++i) lane[i] = (lane[i] ^ (lane[i] >> 47) ^ key(secret, i, seed)) * kPrime32_1;
  }
  void store(u64* out) const { memcpy(out, lane, sizeof lane); }
#endif
};

u64 digest_long(const u8* in, size_t n, u64 seed) {
  u8 secret[kSecretBytes];  // for the two places where words of the key do not begin at words of the secret
  for (size_t i = 0; i < kSecretBytes; i += 16) {
    u64 low = read64(kSecret + i) + seed, high = read64(kSecret + i + 8) - seed;
    memcpy(secret + i, &low, 8);
    memcpy(secret + i + 8, &high, 8);
  }
  constexpr u64 kStart[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                             kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  Lanes lanes(kStart);
  const u8* at = in;
  const size_t stripes = (n - 1) / kStripe;
  for (size_t done = 0; done < stripes; at += kStripe) {
    const size_t word = done % kStripesPerRound;
    lanes.add(at, kSecret + 8 * word, word % 2 == 0 ? seed : 0 - seed);
    if (++done % kStripesPerRound == 0) lanes.scramble(kSecret + kSecretBytes - kStripe, seed);
  }
  lanes.add(in + n - kStripe, secret + kSecretBytes - kStripe - 7, 0);
  u64 lane[8], sum = n * kPrime64_1;
  lanes.store(lane);
  for (int i = 0; i < 4; ++i)
    sum += folded_product(lane[2 * i] ^ read64(secret + 11 + 16 * i),
                          lane[2 * i + 1] ^ read64(secret + 11 + 16 * i + 8));
  return avalanche(sum);
}

u64 digest(const u8* in, size_t n, u64 seed) {
  if (n <= 16) return digest_to_16(in, n, seed);
  if (n <= 128) return digest_to_128(in, n, seed);
  if (n <= 240) return digest_to_240(in, n, seed);
  return digest_long(in, n, seed);
}

// A copy whose target is not read again soon: past the caches, which saves reading the target first. With
// `keep`, a second target of the same bytes (each byte of the source is read once) that does stay in them.
template <bool kKeep>
void copy_past_caches(u8* to, const u8* from, size_t n, u8* keep) {
  size_t at = 0;
#if defined(__AVX2__)
  at = -reinterpret_cast<uintptr_t>(to) % 32;
  if (at > n) at = n;
  if (kKeep) memcpy(keep, from, at);
  memcpy(to, kKeep ? keep : from, at);
  for (; at + 128 <= n; at += 128) {
    const __m256i* in = reinterpret_cast<const __m256i*>(from + at);
    __m256i* out = reinterpret_cast<__m256i*>(to + at);
    __m256i a = _mm256_loadu_si256(in), b = _mm256_loadu_si256(in + 1);
    __m256i c = _mm256_loadu_si256(in + 2), d = _mm256_loadu_si256(in + 3);
    _mm256_stream_si256(out, a);
    _mm256_stream_si256(out + 1, b);
    _mm256_stream_si256(out + 2, c);
    _mm256_stream_si256(out + 3, d);
    if (kKeep) {
      __m256i* kept = reinterpret_cast<__m256i*>(keep + at);
      _mm256_storeu_si256(kept, a);
      _mm256_storeu_si256(kept + 1, b);
      _mm256_storeu_si256(kept + 2, c);
      _mm256_storeu_si256(kept + 3, d);
    }
  }
#endif
  if (kKeep) memcpy(keep + at, from + at, n - at);
  memcpy(to + at, (kKeep ? keep : from) + at, n - at);
}

inline void prefetch(const u8* at, size_t n) {
  for (size_t line = 0; line < n; line += 64) __builtin_prefetch(at + line, 0, 2);
}

// Writes past the caches are seen by other threads in order only after this.
inline void order_writes() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace

extern "C" {

// out[i * segments + s] = digest of the first valid[i] bytes of segment s of row rows[i]; the seed is s.
void pdserve_digest_rows(const u8* base, const int64_t* rows, const int64_t* valid, int64_t n,
                         int64_t segments, int64_t segment_bytes, u64* out) {
  for (int64_t i = 0; i < n; ++i) {
    const u8* row = base + rows[i] * segments * segment_bytes;
    for (int64_t s = 0; s < segments; ++s)
      *out++ = digest(row + s * segment_bytes, static_cast<size_t>(valid[i]), static_cast<u64>(s));
  }
}

// target row target_rows[i] = source row source_rows[i].
void pdserve_copy_rows(const u8* source, const int64_t* source_rows, u8* target, const int64_t* target_rows,
                       int64_t n, int64_t row_bytes, int32_t past_caches) {
  const size_t size = static_cast<size_t>(row_bytes);
  for (int64_t i = 0; i < n; ++i) {
    const u8* from = source + source_rows[i] * row_bytes;
    u8* to = target + target_rows[i] * row_bytes;
    if (past_caches) copy_past_caches<false>(to, from, size, nullptr);
    else memcpy(to, from, size);
  }
  order_writes();
}

// Both in one pass over memory. Some segments at a time go through `scratch` (scratch_bytes, at least one
// segment, small enough to stay in the nearest cache), so that what is digested is what is written, whatever
// happens to the source meanwhile.
void pdserve_copy_and_digest_rows(const u8* source, const int64_t* source_rows, u8* target,
                                  const int64_t* target_rows, const int64_t* valid, int64_t n,
                                  int64_t segments, int64_t segment_bytes, int32_t past_caches, u8* scratch,
                                  int64_t scratch_bytes, u64* out) {
  const int64_t group = scratch_bytes / segment_bytes;
  for (int64_t i = 0; i < n; ++i) {
    const u8* from = source + source_rows[i] * segments * segment_bytes;
    const u8* following = source + source_rows[i + 1 < n ? i + 1 : i] * segments * segment_bytes;
    u8* to = target + target_rows[i] * segments * segment_bytes;
    for (int64_t first = 0; first < segments; first += group) {
      const int64_t end = first + group < segments ? first + group : segments;
      const size_t at = static_cast<size_t>(first * segment_bytes);
      const size_t size = static_cast<size_t>((end - first) * segment_bytes);
      if (past_caches) {
        copy_past_caches<true>(to + at, from + at, size, scratch);
      } else {
        memcpy(scratch, from + at, size);
        memcpy(to + at, scratch, size);
      }
      // What comes next is on its way from memory while this is digested.
      const u8* next = end < segments ? from + end * segment_bytes : following;
      for (int64_t s = first; s < end; ++s) {
        prefetch(next + (s - first) * segment_bytes, static_cast<size_t>(segment_bytes));
        *out++ = digest(scratch + (s - first) * segment_bytes, static_cast<size_t>(valid[i]),
                        static_cast<u64>(s));
      }
    }
  }
  order_writes();
}

}  // extern "C"
