// One token shard as mapped bytes: every number that the file holds is checked before it is used as an index.
// Plain C++ without Python, so a fuzzer can drive it. Damage in the file is a `Damage`, never a read out of bounds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "vtrain/decode.h"

namespace vtrain {

// What is wrong with a file, in one line that names it.
struct Damage : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// An entry of the footer's table: `bytes` bytes of items of `item` bytes, at byte `offset` of the file.
struct Section {
    std::string id;
    uint64_t offset, bytes, item;
};

struct Range {
    uint64_t first, count;
};

struct Segment {
    uint32_t start;
    uint8_t modality, role, variant, flags;
    uint16_t t, h, w, codebook;
};
static_assert(sizeof(Segment) == 16, "format.SEGMENT");

struct SegmentSpan {
    Segment segment;
    int32_t length;
};
static_assert(sizeof(SegmentSpan) == 20, "format.SEGMENT_SPAN");

constexpr uint64_t kSpare = 64;  // zero bytes behind every section: decoding may read them
constexpr uint64_t kLine = 64;
constexpr uint32_t kRunLength = (1u << 24) - 1;
constexpr uint64_t kMaxSample = std::numeric_limits<int32_t>::max();
constexpr uint64_t kMaxRows = std::numeric_limits<uint32_t>::max();
constexpr uint32_t kMaxId = std::numeric_limits<int32_t>::max();  // of what fits the answers

inline void prefetch(const void* from, uint64_t bytes) {
    const char* at = static_cast<const char*>(from);
    for (uint64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(at + i);
}

// Samples are numbered in the shard; callers keep them below `samples`.
class ShardView {
public:
    ShardView() = default;

    // name: the file, for messages; data: all of it, 8-byte aligned. columns: (id, bytes of an item) of the sections
    // with one item per sample that `column` serves by their place here. max_id: larger ids and labels are damage.
    ShardView(std::string name, const uint8_t* data, uint64_t size, uint64_t samples,
              const std::vector<Section>& sections, const std::vector<std::pair<std::string, uint64_t>>& columns,
              uint32_t max_id)
        : name_(std::move(name)), data_(data), samples_(samples), max_id_(std::min(max_id, kMaxId)) {
        if (reinterpret_cast<uintptr_t>(data) % 8) fail("file: mapped at an odd address");
        if (samples > kMaxRows) fail("footer: ", samples, " samples; a shard has 32 bits");
        for (const Section& s : sections) check_place(s, size);
        tokens_ = store(sections, "TOK");
        labels_ = store(sections, "LBL");
        if (tokens_.low == nullptr) fail("section TOK: missing");
        if (labels_.low != nullptr && labels_.count != tokens_.count)
            fail("section LBL: ", labels_.count, " labels for ", tokens_.count, " tokens");
        const Items segments = items(sections, "SEG", sizeof(Segment));
        segments_ = reinterpret_cast<const Segment*>(segments.data);
        token_table_ = table(sections, "OFF", "TOK", tokens_.count);
        segment_table_ = table(sections, "SEGO", "SEG", segments.count);
        if (find(sections, "RUN") != nullptr) {
            const Items runs = items(sections, "RUN", 4);
            runs_ = reinterpret_cast<const uint32_t*>(runs.data);
            run_table_ = table(sections, "RUNO", "RUN", runs.count);
        }
        for (const auto& [id, item] : columns) columns_.push_back(items(sections, id, item, samples).data);
    }

    uint64_t samples() const { return samples_; }

    // The items of a sample: rising and inside their section.
    Range tokens(uint64_t sample) const { return range(token_table_, sample); }
    Range segments(uint64_t sample) const { return range(segment_table_, sample); }
    Range runs(uint64_t sample) const { return runs_ == nullptr ? Range{0, 0} : range(run_table_, sample); }
    const uint8_t* column(size_t place) const { return columns_[place]; }
    const TokenStore& stream(bool labels) const {
        if (labels && labels_.low == nullptr) fail("section LBL: missing");
        return labels ? labels_ : tokens_;
    }

    // Ids of a range that `tokens` gave, or of a part of it.
    void read(bool labels, Range range, int32_t* out) const {
        const uint32_t top = decode(stream(labels), range.first, range.count, out).high;
        if (top > max_id_) fail(labels ? "LBL" : "TOK", ": id ", top, "; the footer says at most ", max_id_);
    }

    // All segments of a sample, in the range that `segments` gave.
    void read_segments(uint64_t sample, Range range, SegmentSpan* out) const {
        const int64_t length = static_cast<int64_t>(tokens(sample).count);
        const Segment* from = segments_ + range.first;
        for (uint64_t i = 0; i < range.count; ++i) {
            const int64_t stop = i + 1 < range.count ? int64_t{from[i + 1].start} : length;
            if (stop < int64_t{from[i].start} || stop > length)
                fail("SEG: sample ", sample, ": expected starts that rise and stay inside the sample");
            out[i] = {from[i], static_cast<int32_t>(stop - from[i].start)};
        }
    }

    // All loss runs of a sample as stored, in the range that `runs` gave.
    void read_runs(uint64_t sample, Range range, uint32_t* out) const {
        uint64_t total = 0;
        for (uint64_t i = 0; i < range.count; ++i) {
            out[i] = runs_[range.first + i];
            total += out[i] & kRunLength;
        }
        const uint64_t length = tokens(sample).count;
        if (range.count && total != length)
            fail("RUN: sample ", sample, ": loss runs of ", total, " tokens; expected ", length);
    }

    void prefetch_tokens(uint64_t sample) const { __builtin_prefetch(token_table_.offsets + sample); }
    void prefetch_segments(uint64_t sample) const { __builtin_prefetch(segment_table_.offsets + sample); }
    void prefetch_runs(uint64_t sample) const {
        if (runs_ != nullptr) __builtin_prefetch(run_table_.offsets + sample);
    }
    void prefetch_segment_rows(Range range) const { prefetch(segments_ + range.first, range.count * sizeof(Segment)); }
    void prefetch_run_rows(Range range) const { prefetch(runs_ + range.first, range.count * 4); }

    // The first lines of a range of ids: the hardware finds the rest.
    void prefetch_ids(bool labels, Range range) const {
        const TokenStore& s = stream(labels);
        const uint64_t bytes = range.count * static_cast<uint64_t>(s.low_bytes);
        prefetch(s.low + range.first * static_cast<uint64_t>(s.low_bytes), bytes < kAhead ? bytes : kAhead);
        if (s.high_bits) __builtin_prefetch(s.high + range.first * static_cast<uint64_t>(s.high_bits) / 8);
    }

    // Calls use(first byte, bytes) for what a later read of the sample touches: first its rows in the tables, then,
    // with `rows`, what those point to.
    template <class Use>
    void touched(uint64_t sample, bool rows, Use use) const {
        if (!rows) {
            use(token_table_.offsets + sample, uint64_t{8});
            use(segment_table_.offsets + sample, uint64_t{8});
            if (runs_ != nullptr) use(run_table_.offsets + sample, uint64_t{8});
            return;
        }
        const Range ids = tokens(sample), pieces = segments(sample), weights = runs(sample);
        for (const TokenStore& s : {tokens_, labels_}) {
            if (s.low == nullptr) continue;
            const auto low = static_cast<uint64_t>(s.low_bytes), bits = static_cast<uint64_t>(s.high_bits);
            use(s.low + ids.first * low, ids.count * low);
            if (bits) use(s.high + ids.first * bits / 8, ids.count * bits / 8 + 1);
        }
        use(segments_ + pieces.first, pieces.count * sizeof(Segment));
        if (weights.count) use(runs_ + weights.first, weights.count * 4);
    }

private:
    static constexpr uint64_t kAhead = 8 * kLine;

    // samples + 1 offsets into a section of `size` items.
    struct Table {
        const char *name = "", *items = "";
        const uint32_t* offsets = nullptr;
        uint64_t size = 0;
    };

    template <class... Parts>
    [[noreturn]] void fail(const Parts&... parts) const {
        std::ostringstream line;
        ((line << name_ << ": ") << ... << parts);
        throw Damage(line.str());
    }

    Range range(const Table& table, uint64_t sample) const {
        const uint64_t start = table.offsets[sample], stop = table.offsets[sample + 1];
        if (stop < start || stop > table.size || stop - start > kMaxSample)
            fail(table.name, ": sample ", sample, " spans ", start, "..", stop, "; expected a rising span within the ",
                 table.size, " items of ", table.items);
        return {start, stop - start};
    }

    static const Section* find(const std::vector<Section>& sections, const std::string& id) {
        for (const Section& s : sections)
            if (s.id == id) return &s;
        return nullptr;
    }

    void check_place(const Section& s, uint64_t size) const {
        if (s.offset % 8 || s.offset > size || s.bytes > size - s.offset || size - s.offset - s.bytes < kSpare ||
            s.item == 0 || s.bytes % s.item)
            fail("section ", s.id, ": ", s.bytes, " bytes at byte ", s.offset, ", items of ", s.item,
                 "; expected whole items and ", kSpare, " spare bytes within the file's ", size);
    }

    struct Items {
        const uint8_t* data;
        uint64_t count;
    };

    // A section that must be there, with items of that many bytes.
    Items items(const std::vector<Section>& sections, const std::string& id, uint64_t item) const {
        const Section* s = find(sections, id);
        if (s == nullptr) fail("section ", id, ": missing");
        if (s->item != item) fail("section ", id, ": items of ", s->item, " bytes; expected ", item);
        return {data_ + s->offset, s->bytes / item};
    }

    Items items(const std::vector<Section>& sections, const std::string& id, uint64_t item, uint64_t count) const {
        const Items found = items(sections, id, item);
        if (found.count != count) fail("section ", id, ": ", found.count, " items; expected ", count);
        return found;
    }

    Table table(const std::vector<Section>& sections, const char* id, const char* of, uint64_t size) const {
        return {id, of, reinterpret_cast<const uint32_t*>(items(sections, id, 4, samples_ + 1).data), size};
    }

    // Section `id` with its plane of high bits, `id`1 or `id`2; nothing where there is no such section.
    TokenStore store(const std::vector<Section>& sections, const std::string& id) const {
        const Section* low = find(sections, id);
        if (low == nullptr) return {};
        if (low->item != 1 && low->item != 2 && low->item != 4)
            fail("section ", id, ": ids of ", low->item, " bytes; expected 1, 2 or 4");
        TokenStore found{data_ + low->offset, nullptr, low->bytes / low->item, static_cast<int>(low->item), 0};
        for (const int bits : {1, 2}) {
            const std::string plane = id + std::to_string(bits);
            if (find(sections, plane) == nullptr) continue;
            if (low->item != 2 || found.high_bits) fail("section ", plane, ": high bits belong to ids of 2 bytes, once");
            found.high = items(sections, plane, 1, (found.count * static_cast<uint64_t>(bits) + 7) / 8).data;
            found.high_bits = bits;
        }
        return found;
    }

    std::string name_;
    const uint8_t* data_ = nullptr;
    uint64_t samples_ = 0;
    uint32_t max_id_ = 0;
    TokenStore tokens_, labels_;
    Table token_table_, segment_table_, run_table_;
    const Segment* segments_ = nullptr;
    const uint32_t* runs_ = nullptr;
    std::vector<const uint8_t*> columns_;
};

}  // namespace vtrain
