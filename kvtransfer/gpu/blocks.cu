// Copies of scattered blocks within what one GPU can address: packing, scattering, and a peer's pool to ours.
//
// target[places[i]] = source[chosen[i]] for rows of `row_bytes`; packing has places 0..n-1, scattering has
// chosen 0..n-1. A thread block copies one tile of one row, so a launch has rows x tiles_per_row thread blocks,
// whatever the size of a row, and the only division is one per thread block. The caller (cuda.py) has checked
// every row number: nothing is checked here.

namespace {

constexpr int kThreads = 256;
constexpr int kWordsPerThread = 4;  // loads in flight before the first store
constexpr long long kTileWords = kThreads * kWordsPerThread;

template <typename Word>
__device__ void copy_tile(const char* source, const long long* chosen, char* target, const long long* places,
                          long long row_bytes, unsigned tiles_per_row) {
  const unsigned row = blockIdx.x / tiles_per_row, tile = blockIdx.x % tiles_per_row;
  const Word* from = reinterpret_cast<const Word*>(source + chosen[row] * row_bytes);
  Word* to = reinterpret_cast<Word*>(target + places[row] * row_bytes);
  const long long row_words = row_bytes / static_cast<long long>(sizeof(Word));
  const long long first = tile * kTileWords + threadIdx.x;
  Word held[kWordsPerThread];
#pragma unroll
  for (int k = 0; k < kWordsPerThread; ++k) {
    const long long at = first + k * kThreads;  // neighbouring threads, neighbouring words
    if (at < row_words) held[k] = from[at];
  }
#pragma unroll
  for (int k = 0; k < kWordsPerThread; ++k) {
    const long long at = first + k * kThreads;
    if (at < row_words) to[at] = held[k];
  }
}

}  // namespace

// Where both bases and row_bytes are multiples of 16.
extern "C" __global__ void pdserve_copy_rows_16(const char* source, const long long* chosen, char* target,
                                                const long long* places, long long row_bytes,
                                                unsigned tiles_per_row) {
  copy_tile<uint4>(source, chosen, target, places, row_bytes, tiles_per_row);
}

// Any alignment.
extern "C" __global__ void pdserve_copy_rows_1(const char* source, const long long* chosen, char* target,
                                               const long long* places, long long row_bytes,
                                               unsigned tiles_per_row) {
  copy_tile<unsigned char>(source, chosen, target, places, row_bytes, tiles_per_row);
}
