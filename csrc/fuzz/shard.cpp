// shard_view.h and decode.h: any section table over any bytes, and every way to read it. The layout of an input is that
// of scripts/fuzz_seeds.py, which makes seeds out of written shards; checksums are asked for by nobody here.
#include <algorithm>
#include <string>
#include <utility>

#include "input.h"
#include "vtrain/shard_view.h"

namespace {

using fuzz::claim;
using fuzz::Input;
using vtrain::Damage;
using vtrain::Range;
using vtrain::Section;
using vtrain::ShardView;

const char* const kIds[] = {"TOK",  "TOK1", "TOK2", "LBL",  "LBL1",  "LBL2",  "OFF",    "SEG",
                            "SEGO", "RUN",  "RUNO", "KEY", "COL.a", "COL.b", "SCHEMA", "BCRC"};
const char* const kIsas[] = {"portable", "avx2", "avx512"};

struct Query {
    uint16_t sample, start, count;
};

// Ids of a stream from the bytes, without what is tested.
class Stream {
public:
    Stream(const std::vector<uint8_t>& file, const std::vector<Section>& sections, const std::string& id)
        : file_(file) {
        for (const Section& s : sections) {
            if (s.id == id && low_ == nullptr) low_ = &s;
            for (const char* bits : {"1", "2"})
                if (s.id == id + bits && high_ == nullptr) high_ = &s, bits_ = static_cast<unsigned>(*bits - '0');
        }
    }

    uint32_t at(uint64_t i) const {
        uint32_t id = 0;
        for (uint64_t byte = 0; byte < low_->item; ++byte)
            id |= static_cast<uint32_t>(file_.at(low_->offset + i * low_->item + byte)) << (8 * byte);
        for (unsigned bit = 0; bit < bits_; ++bit) {
            const uint64_t place = i * bits_ + bit;
            id |= static_cast<uint32_t>(file_.at(high_->offset + place / 8) >> (place % 8) & 1) << (16 + bit);
        }
        return id;
    }

private:
    const std::vector<uint8_t>& file_;
    const Section *low_ = nullptr, *high_ = nullptr;
    unsigned bits_ = 0;
};

template <class Step>
bool damaged(Step&& step) {
    try {
        step();
    } catch (const Damage&) {
        return true;
    }
    return false;
}

void read_ids(const ShardView& view, bool labels, const Stream& stream, Range part, uint32_t max_id) {
    std::vector<int32_t> expected;
    bool legal = true;
    for (uint64_t i = part.first; i < part.first + part.count; ++i) {
        const uint32_t id = stream.at(i);
        legal &= id <= std::min(max_id, vtrain::kMaxId);
        expected.push_back(static_cast<int32_t>(id));
    }
    view.prefetch_ids(labels, part);
    for (const char* isa : kIsas) {
        if (!vtrain::force_isa(isa)) continue;
        std::vector<int32_t> found(part.count);
        claim(damaged([&] { view.read(labels, part, found.data()); }) != legal, "ids above the largest are damage");
        claim(found == expected, "decoded ids are those of the bytes");
    }
    vtrain::force_isa(nullptr);
}

void read_segments(const ShardView& view, uint64_t sample) {
    const Range range = view.segments(sample);
    view.prefetch_segment_rows(range);
    std::vector<vtrain::SegmentSpan> spans(range.count);
    view.read_segments(sample, range, spans.data());
    int64_t end = 0;
    for (size_t i = 0; i < spans.size(); ++i) {
        claim(spans[i].length >= 0 && (i == 0 || spans[i].segment.start == end), "segments follow each other");
        end = int64_t{spans[i].segment.start} + spans[i].length;
    }
    claim(spans.empty() || end == static_cast<int64_t>(view.tokens(sample).count), "segments end with the sample");
}

void read_runs(const ShardView& view, uint64_t sample) {
    const Range range = view.runs(sample);
    view.prefetch_run_rows(range);
    std::vector<uint32_t> runs(range.count);
    view.read_runs(sample, range, runs.data());
    uint64_t total = 0;
    for (uint32_t run : runs) total += run & vtrain::kRunLength;
    claim(runs.empty() || total == view.tokens(sample).count, "runs cover the sample");
}

void check_touched(const ShardView& view, uint64_t sample, const std::vector<uint8_t>& file) {
    const auto begin = reinterpret_cast<uintptr_t>(file.data());
    for (bool rows : {false, true})
        view.touched(sample, rows, [&](const void* from, uint64_t bytes) {
            const auto at = reinterpret_cast<uintptr_t>(from);
            claim(at >= begin && at - begin <= file.size() && bytes <= file.size() - (at - begin),
                  "what a read touches lies in the file");
        });
}

void ask(const ShardView& view, const Query& q, const std::vector<uint8_t>& file, const std::vector<Section>& sections,
         const std::vector<std::pair<std::string, uint64_t>>& columns, uint32_t max_id) {
    const uint64_t sample = q.sample % view.samples();
    const bool labels = !damaged([&] { view.stream(true); });
    view.prefetch_tokens(sample);
    view.prefetch_segments(sample);
    view.prefetch_runs(sample);
    damaged([&] {
        const Range whole = view.tokens(sample);
        const uint64_t start = q.start % (whole.count + 1), count = q.count % (whole.count - start + 1);
        for (const Range& part : {whole, Range{whole.first + start, count}}) {
            read_ids(view, false, Stream(file, sections, "TOK"), part, max_id);
            if (labels) read_ids(view, true, Stream(file, sections, "LBL"), part, max_id);
        }
    });
    damaged([&] { read_segments(view, sample); });
    damaged([&] { read_runs(view, sample); });
    damaged([&] { check_touched(view, sample, file); });
    for (size_t place = 0; place < columns.size(); ++place) {
        std::vector<uint8_t> value(columns[place].second);
        std::memcpy(value.data(), view.column(place) + sample * value.size(), value.size());
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input in(data, size);
    const auto flags = in.number<uint8_t>();
    uint64_t samples = in.number<uint32_t>();
    if (flags & 2) samples <<= 32;
    const auto max_id = in.number<uint32_t>();
    std::vector<std::pair<std::string, uint64_t>> columns;
    if (flags & 1) columns = {{"KEY", 8}, {"COL.a", 4}};
    std::vector<Section> sections(in.number<uint8_t>() % 20);
    for (Section& s : sections) {
        s.id = kIds[in.number<uint8_t>() % 16];
        const auto item = in.number<uint8_t>();
        s.item = item & 31;
        s.offset = in.number<uint32_t>();
        s.bytes = in.number<uint32_t>();
        if (item & 64) s.offset = ~s.offset;  // sums that wrap
        if (item & 128) s.bytes = ~s.bytes;
    }
    std::vector<Query> queries(in.number<uint8_t>() % 32);
    for (Query& q : queries) q = in.number<Query>();
    const std::vector<uint8_t> file = in.bytes(in.left());
    damaged([&] {
        const ShardView view("shard", file.data(), file.size(), samples, sections, columns, max_id);
        if (samples == 0) return;
        for (const Query& q : queries) ask(view, q, file, sections, columns, max_id);
    });
    return 0;
}
