// Whether samples are legal: what the writer asks of every batch and `verify` of every shard, in one pass over the ids.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>

#include "vtrain/decode.h"

namespace vtrain {

// The numbers are those of samples.Rule.
enum Rule : int {
    kLegal = 0,
    kZeroKey = 1,
    kFirstStart = 2,
    kSpan = 3,
    kModality = 4,
    kRole = 5,
    kFlags = 6,
    kGrid = 7,
    kSegmentId = 8,
    kBareId = 9,
    kRuns = 10,
    kLabel = 11,
};

#pragma pack(push, 1)
struct PackedSegment {  // format.SEGMENT, at any address
    uint32_t start;
    uint8_t modality, role, variant, flags;
    uint16_t t, h, w, codebook;
};
#pragma pack(pop)
static_assert(sizeof(PackedSegment) == 16, "segments are 16 bytes in files");

struct Extremes {
    int64_t low = std::numeric_limits<int64_t>::max();
    int64_t high = std::numeric_limits<int64_t>::min();
    void add(int64_t a, int64_t b) {
        low = std::min(low, a);
        high = std::max(high, b);
    }
};

struct Seen;

// Ids first..first+count-1 of a flat array of integers, or of the two planes that a shard stores of ids of 17, 18 bits.
class Ids {
  public:
    // `all` numbers of `item` bytes, kind 'u' or 'i' as in numpy; plane: null, or `bits` more of each id of u2 in
    // plane_bytes bytes. count: none = all from `first` on. portable: without wide vectors, for tests. What does not
    // fit is a std::invalid_argument or std::out_of_range.
    Ids(const void* data, char kind, int item, uint64_t all, const uint8_t* plane, uint64_t plane_bytes, int bits,
        uint64_t first, std::optional<uint64_t> count, bool portable = false);

    uint64_t size() const { return count_; }
    // Whether ids begin..stop-1, which the caller knows to be there, lie in low..end-1, where low >= 0.
    bool within(uint64_t begin, uint64_t stop, int64_t low, int64_t end, Seen& seen) const;
    Extremes extremes(const Seen& seen) const;
    int64_t at(uint64_t i) const;

  private:
    template <class T>
    const T* items() const {
        return static_cast<const T*>(data_);
    }
    uint32_t stored(uint64_t token) const;
    bool stored_within(uint64_t begin, size_t n, int64_t low, int64_t end, Seen& seen) const;

    const void* data_;
    char kind_;
    int item_;
    bool wide_;
    TokenStore store_;  // of ids with a plane
    uint64_t first_, count_ = 0, quick_ = 0;
};

struct Found {  // the first rule that is broken
    Rule rule = kLegal;
    int64_t sample = 0, item = 0, value = 0;  // item: segment or token of the sample; value: the id, or sum of runs
};

struct Batch {
    const Ids* ids;
    const Ids* labels;  // null = none
    const int64_t* cu;
    const PackedSegment* segments;
    const int64_t* segment_cu;
    const uint64_t* keys;
    const uint32_t* runs;  // null = none
    const int64_t* run_cu;
    const int64_t* spans;  // [2][modalities][2]: plain and merged segments; first id and the one after the last
    int64_t modalities, roles, vocab;
    size_t count;
};

// The first rule that a batch breaks. seen: of all ids and labels that were looked at.
Found check(const Batch& batch, Extremes& seen);

// std::invalid_argument unless the `count` offsets rise from 0 to `size`, n + 1 of them: nothing beyond is read then.
void check_offsets(const int64_t* cu, size_t count, size_t n, uint64_t size, const char* name);

}  // namespace vtrain
