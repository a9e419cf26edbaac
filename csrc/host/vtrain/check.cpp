#include "check.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "vtrain/planes.h"

namespace vtrain {

constexpr size_t kVector = 32;

// The lowest and the highest of all ids that were looked at: of long spans lane by lane, as numbers of the ids' type.
struct Seen {
    alignas(kVector) char low[kVector], high[kVector];
    bool lanes = false;
    Extremes rest;
};

namespace {

constexpr uint32_t kMaxRun = (1u << 24) - 1;

// Whether ids[0..n-1] lie in low..last. No sum over lanes per span: that costs as much as 500 ids.
// Compiled twice, for any x86-64 and with 32-byte vectors: the ids are most of the bytes that are checked.
template <class T>
inline __attribute__((always_inline)) bool within_of(const T* ids, size_t n, T low, T last, Seen& seen) {
    typedef T Vector __attribute__((vector_size(kVector)));
    constexpr size_t kLanes = kVector / sizeof(T);
    if (n < kLanes) {
        bool good = true;
        for (size_t i = 0; i < n; ++i) {
            good &= ids[i] >= low && ids[i] <= last;
            seen.rest.add(static_cast<int64_t>(ids[i]), static_cast<int64_t>(ids[i]));
        }
        return good;
    }
    Vector lowest, highest, next;
    std::memcpy(&lowest, ids, kVector);
    highest = lowest;
    for (size_t i = kLanes; i + kLanes <= n; i += kLanes) {
        std::memcpy(&next, ids + i, kVector);
        lowest = next < lowest ? next : lowest;
        highest = next > highest ? next : highest;
    }
    std::memcpy(&next, ids + n - kLanes, kVector);  // the last ones, some of them again
    lowest = next < lowest ? next : lowest;
    highest = next > highest ? next : highest;
    auto wrong = (lowest < low) | (highest > last);
    if (seen.lanes) {
        std::memcpy(&next, seen.low, kVector);
        lowest = next < lowest ? next : lowest;
        std::memcpy(&next, seen.high, kVector);
        highest = next > highest ? next : highest;
    }
    std::memcpy(seen.low, &lowest, kVector);
    std::memcpy(seen.high, &highest, kVector);
    seen.lanes = true;
    uint64_t words[kVector / 8];
    std::memcpy(words, &wrong, kVector);
    return (words[0] | words[1] | words[2] | words[3]) == 0;
}

#if defined(__x86_64__)
template <class T>
__attribute__((target("avx2"))) bool within_avx2(const T* ids, size_t n, T low, T last, Seen& seen) {
    return within_of(ids, n, low, last, seen);
}
#endif

bool wide_vectors() {
#if defined(__x86_64__)
    static const bool supported = __builtin_cpu_supports("avx2");
    return supported;
#else
    return false;
#endif
}

// Of ids low..end-1, of which those that a T cannot hold do not matter.
template <class T>
bool within(const T* ids, size_t n, int64_t low, int64_t end, Seen& seen, [[maybe_unused]] bool wide) {
    int64_t first = std::max(low, static_cast<int64_t>(std::numeric_limits<T>::min()));
    int64_t last = std::min(end - 1, static_cast<int64_t>(std::numeric_limits<T>::max()));
    if (first > last) return false;
#if defined(__x86_64__)
    if (wide) return within_avx2(ids, n, static_cast<T>(first), static_cast<T>(last), seen);
#endif
    return within_of(ids, n, static_cast<T>(first), static_cast<T>(last), seen);
}

template <class T>
Extremes extremes_of(const Seen& seen) {
    Extremes found = seen.rest;
    if (!seen.lanes) return found;
    constexpr size_t kLanes = kVector / sizeof(T);
    T low[kLanes], high[kLanes];
    std::memcpy(low, seen.low, kVector);
    std::memcpy(high, seen.high, kVector);
    for (size_t i = 0; i < kLanes; ++i) found.add(static_cast<int64_t>(low[i]), static_cast<int64_t>(high[i]));
    return found;
}

}  // namespace

Ids::Ids(const void* data, char kind, int item, uint64_t all, const uint8_t* plane, uint64_t plane_bytes, int bits,
         uint64_t first, std::optional<uint64_t> count, bool portable)
    : data_(data), kind_(kind), item_(item), wide_(!portable && wide_vectors()), first_(first) {
    bool known = kind == 'u' ? item == 1 || item == 2 || item == 4 : kind == 'i' && (item == 4 || item == 8);
    if (!known) throw std::invalid_argument("ids: expected u1, u2, u4, i4 or i8 of this machine's byte order");
    if (plane != nullptr) {
        if (bits < 1 || bits > 2 || kind != 'u' || item != 2)
            throw std::invalid_argument("ids: a flat plane of 1 or 2 bits stands beside ids of u2");
        uint64_t per_byte = 8 / static_cast<uint64_t>(bits);
        if (all > plane_bytes * per_byte) throw std::out_of_range("ids: the plane is too short");
        store_ = {static_cast<const uint8_t*>(data), plane, all, 2, bits};
        // decode reads up to 64 bytes more: not at the very end, which may be that of the memory.
        quick_ = std::min(all - std::min<uint64_t>(all, 32),
                          (plane_bytes - std::min<uint64_t>(plane_bytes, 64)) * per_byte);
    }
    if (first > all || (count && *count > all - first)) throw std::out_of_range("ids: not so many in the array");
    count_ = count ? *count : all - first;
}

bool Ids::within(uint64_t begin, uint64_t stop, int64_t low, int64_t end, Seen& seen) const {
    size_t n = static_cast<size_t>(stop - begin);
    begin += first_;
    if (store_.high_bits) return stored_within(begin, n, low, end, seen);
    if (item_ == 1) return vtrain::within(items<uint8_t>() + begin, n, low, end, seen, wide_);
    if (item_ == 2) return vtrain::within(items<uint16_t>() + begin, n, low, end, seen, wide_);
    if (item_ == 8) return vtrain::within(items<int64_t>() + begin, n, low, end, seen, wide_);
    if (kind_ == 'u') return vtrain::within(items<uint32_t>() + begin, n, low, end, seen, wide_);
    return vtrain::within(items<int32_t>() + begin, n, low, end, seen, wide_);
}

Extremes Ids::extremes(const Seen& seen) const {
    if (store_.high_bits) return extremes_of<int32_t>(seen);
    if (item_ == 1) return extremes_of<uint8_t>(seen);
    if (item_ == 2) return extremes_of<uint16_t>(seen);
    if (item_ == 8) return extremes_of<int64_t>(seen);
    return kind_ == 'u' ? extremes_of<uint32_t>(seen) : extremes_of<int32_t>(seen);
}

int64_t Ids::at(uint64_t i) const {
    i += first_;
    if (store_.high_bits) return stored(i);
    if (item_ == 1) return items<uint8_t>()[i];
    if (item_ == 2) return items<uint16_t>()[i];
    if (item_ == 8) return items<int64_t>()[i];
    return kind_ == 'u' ? static_cast<int64_t>(items<uint32_t>()[i]) : items<int32_t>()[i];
}

uint32_t Ids::stored(uint64_t token) const {
    return items<uint16_t>()[token] | plane_bits(store_.high, store_.high_bits, token) << 16;
}

bool Ids::stored_within(uint64_t begin, size_t n, int64_t low, int64_t end, Seen& seen) const {
    constexpr size_t kChunk = 1024;  // 4 KB of decoded ids stay in the first cache
    int32_t ids[kChunk];
    Bounds found;
    for (size_t i = 0; i < n; i += kChunk) {
        size_t count = std::min(kChunk, n - i);
        if (begin + i + count <= quick_) {
            Bounds some = decode(store_, begin + i, count, ids);
            found.add(some.low, some.high);
        } else {
            for (size_t j = i; j < i + count; ++j) found.add(stored(begin + j), stored(begin + j));
        }
    }
    if (n) seen.rest.add(found.low, found.high);
    return n == 0 || (found.low >= low && found.high < end);
}

namespace {

class Checker {
  public:
    // together: neighbouring spans that may have the same ids are looked at as one. That is twice as fast where spans
    // have 200 ids, and finds whether a rule is broken, but not which one is the first.
    Checker(const Batch& batch, bool together) : b(batch), together_(together) {}

    Found run() {
        for (size_t i = 0; i < b.count && found.rule == kLegal; ++i) check(i);
        if (b.labels && together_) ids_within(*b.labels, labels_seen, 0, 0, b.cu[b.count], 0, b.vocab, kLabel);
        look();
        return found;
    }

    // Of all ids and labels that were looked at.
    Extremes extremes() const {
        Extremes found = b.ids->extremes(ids_seen);
        if (b.labels) {
            Extremes labels = b.labels->extremes(labels_seen);
            found.add(labels.low, labels.high);
        }
        return found;
    }

  private:
    void check(size_t i) {
        int64_t length = b.cu[i + 1] - b.cu[i];
        if (b.keys[i] == 0) return broken(kZeroKey, i, 0, 0);
        if (b.segment_cu[i] == b.segment_cu[i + 1])
            ids_within(*b.ids, ids_seen, i, 0, length, 0, b.vocab, kBareId);
        else
            segments_of(i, length);
        if (b.runs) runs_of(i, length);
        if (b.labels && !together_) ids_within(*b.labels, labels_seen, i, 0, length, 0, b.vocab, kLabel);
    }

    void segments_of(size_t i, int64_t length) {
        int64_t first = b.segment_cu[i], last = b.segment_cu[i + 1];
        for (int64_t j = first; j < last && found.rule == kLegal; ++j) {
            const PackedSegment& s = b.segments[j];
            int64_t stop = j + 1 < last ? static_cast<int64_t>(b.segments[j + 1].start) : length;
            int64_t tokens = stop - static_cast<int64_t>(s.start);
            bool merged = s.flags & 1, picture = s.modality == 1 || s.modality == 2;
            int64_t grid = static_cast<int64_t>(s.t) * s.h * s.w;
            Rule rule = kLegal;
            if (j == first && s.start != 0) rule = kFirstStart;
            else if (tokens < 0) rule = kSpan;
            else if (s.modality >= b.modalities) rule = kModality;
            else if (s.role >= b.roles) rule = kRole;
            else if (s.flags > 1) rule = kFlags;
            else if (picture && !merged && (s.t | s.h | s.w) && grid != tokens) rule = kGrid;
            if (rule != kLegal) return broken(rule, i, j - first, tokens);
            const int64_t* span = b.spans + (merged * b.modalities + s.modality) * 2;
            // A start after the sample's end is found at the last segment, which then has less than no tokens.
            ids_within(*b.ids, ids_seen, i, s.start, std::min(stop, length), span[0], span[1], kSegmentId);
        }
    }

    // Tokens start..stop-1 of sample i hold ids in low..end-1.
    void ids_within(const Ids& ids, Seen& seen, size_t i, int64_t start, int64_t stop, int64_t low, int64_t end,
                    Rule rule) {
        if (start >= stop || found.rule != kLegal) return;
        uint64_t base = static_cast<uint64_t>(b.cu[i]);
        Span span{&ids, &seen, base + static_cast<uint64_t>(start), base + static_cast<uint64_t>(stop), low, end};
        if (together_) return add(span);
        if (span.legal()) return;
        for (int64_t token = start; token < stop; ++token) {
            int64_t id = ids.at(base + static_cast<uint64_t>(token));
            if (id < low || id >= end) return broken(rule, i, token, id);
        }
    }

    // Ids that were not looked at yet.
    struct Span {
        const Ids* ids = nullptr;
        Seen* seen = nullptr;
        uint64_t begin = 0, stop = 0;
        int64_t low = 0, end = 0;
        bool legal() const { return begin == stop || ids->within(begin, stop, low, end, *seen); }
    };

    void add(const Span& next) {
        bool same = next.ids == open_.ids && next.low == open_.low && next.end == open_.end;
        if (!same || next.begin != open_.stop) {
            look();
            open_ = next;
        }
        open_.stop = next.stop;
    }

    void look() {
        if (found.rule == kLegal && !open_.legal()) found.rule = kSegmentId;
        open_ = {};
    }

    void runs_of(size_t i, int64_t length) {
        if (found.rule != kLegal || b.run_cu[i] == b.run_cu[i + 1]) return;
        int64_t sum = 0;
        for (int64_t j = b.run_cu[i]; j < b.run_cu[i + 1]; ++j) sum += b.runs[j] & kMaxRun;
        if (sum != length) broken(kRuns, i, 0, sum);
    }

    void broken(Rule rule, size_t sample, int64_t item, int64_t value) {
        found = Found{rule, static_cast<int64_t>(sample), item, value};
    }

    Batch b;
    bool together_;
    Found found;
    Seen ids_seen, labels_seen;
    Span open_;
};

}  // namespace

Found check(const Batch& batch, Extremes& seen) {
    Found found;
    for (bool together : {true, false}) {
        Checker checker(batch, together);
        found = checker.run();
        seen = checker.extremes();
        if (found.rule == kLegal) break;
    }
    return found;
}

void check_offsets(const int64_t* cu, size_t count, size_t n, uint64_t size, const char* name) {
    if (count == n + 1 && cu[0] == 0 && static_cast<uint64_t>(cu[n]) == size && std::is_sorted(cu, cu + count)) return;
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(n + 1) +
                                " offsets that rise from 0 to " + std::to_string(size));
}

}  // namespace vtrain
